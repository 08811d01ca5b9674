"""Injected faults: each has its effect, the preflight detects it, and students trained with it are marked."""

import json

import numpy as np
import pytest
import torch

from kdlib.corpus.inputs import Batch
from kdlib.corpus.utterances import Utterance
from kdlib.diagnose import collapse_study
from kdlib.distill import faults
from kdlib.distill.checks import REFUSE, WARN
from kdlib.distill.faults import FaultyStore
from kdlib.errors import UserError
from kdlib.evaluate.hypotheses import read_hypotheses
from kdlib.logits.store import Header, LogitStore, Writer
from kdlib.pipeline import Fold
from kdlib.settings.schedule import constant
from kdlib.targets.aggregation import TeacherEnsemble, Weighting
from kdlib.tokens import Tokens

V = 12
LENGTHS = {"A_1": 6, "A_2": 9, "B_1": 4, "B_2": 7}  # of two speakers and two words


@pytest.fixture(scope="module")
def stores(tmp_path_factory):
    folder = tmp_path_factory.mktemp("stores")
    torch.manual_seed(0)
    stores = {}
    for name in ("A", "B"):
        head = torch.randn(V, 5), torch.randn(V)
        header = Header(
            **{"teacher": name, "train_speakers": (name,), "output": "ctc", "encoding": "fp16", "size": V, "width": 5},
            **{"tokens": "t", "blank": 2, "bos": 0, "eos": 1, "stride_ms": 40.0},
        )
        with Writer(folder / name, header, head) as writer:
            for utt_id, length in LENGTHS.items():
                writer.add(utt_id, torch.randn(length, 5).half().float())
        stores[name] = LogitStore(folder / name)
    return stores


def utterances():
    words = {"A_1": "ONE", "A_2": "TWO", "B_1": "ONE", "B_2": "TWO"}
    return [Utterance(name, name[0], "", 1.0, word, block="B1", repetition="1") for name, word in words.items()]


def batch(utt_id):
    return Batch([utt for utt in utterances() if utt.utt_id == utt_id])


def test_a_token_shift_moves_logits_by_one_id_and_keeps_special_ids(stores):
    store = FaultyStore(stores["A"], None, shift=1)
    plain, shifted = stores["A"].logits("A_1"), store.logits("A_1")
    assert torch.allclose(shifted[:, 4:], plain[:, 3:-1])
    assert torch.allclose(shifted[:, 3], plain[:, -1])
    assert torch.equal(shifted[:, :3], plain[:, :3])
    both = TeacherEnsemble({"A": store, "B": FaultyStore(stores["B"], None, shift=1)}, Weighting())
    mean, _ = both.logits(batch("A_1"))
    naive = (shifted + FaultyStore(stores["B"], None, shift=1).logits("A_1")) / 2
    assert torch.allclose(mean[0], naive, atol=1e-5)


def test_a_delayed_teacher_is_shifted_by_frames(stores):
    delayed, advanced = FaultyStore(stores["A"], None, delay=2), FaultyStore(stores["A"], None, delay=-2)
    plain = stores["A"].hidden("A_2")
    assert torch.equal(delayed.hidden("A_2")[2:], plain[:-2])
    assert torch.equal(delayed.hidden("A_2")[:2], plain[:1].expand(2, -1))
    assert torch.equal(advanced.hidden("A_2")[:-2], plain[2:])


def test_own_recordings_are_of_each_teachers_speaker_and_cut_to_the_shortest(stores):
    own = {name: FaultyStore(store, faults._own_recordings(utterances(), name)) for name, store in stores.items()}
    mean, frames = TeacherEnsemble(own, Weighting(cut=True)).logits(batch("A_2"), torch.tensor([9]))
    naive = (stores["A"].logits("A_2")[:7] + stores["B"].logits("B_2")[:7]) / 2
    assert (frames.tolist(), mean.shape[1]) == ([7], 9)  # the rest is padding
    assert torch.allclose(mean[0, :7], naive, atol=1e-5)
    with pytest.raises(UserError, match="another recording"):  # refused without `cut`
        TeacherEnsemble(own, Weighting()).logits(batch("A_2"), torch.tensor([9]))


def test_mispaired_targets_use_every_other_utterance_once():
    source = faults._mispaired(utterances(), 1)
    pairs = {name: source(name) for name in LENGTHS}
    assert sorted(pairs.values()) == sorted(LENGTHS)
    assert all(name != source_id for name, source_id in pairs.items())
    assert source("unknown") is None


@pytest.fixture(scope="module")
def faulty(with_teachers, outputs):
    """The smoke recipe's distilled student with a fault added."""

    def load_faulty(of="ctc_kd", **setting):
        overrides = {"outputs": str(outputs), "variants": {"broken": setting}}
        return Fold.load("params/smoke.yaml", "M08", f"{of}+broken", overrides=overrides)

    return load_faulty


def checks(fold):
    return {check.name: check for check in fold.preflight()}


def causes_of(fold):
    return collapse_study.causes_of(fold.params.faults, fold.params.distill)


DECODER = {"student": {"decoder_layers": 1}, "distill": {"heads": "decoder", "allow_decoder_kd": True}}


@pytest.mark.parametrize(
    ("setting", "check", "verdict"),
    [
        ({"faults": {"token_shift": 1}}, "stored and live", REFUSE),
        ({"faults": {"mispaired": True}}, "recording", REFUSE),
        ({"faults": {"choose_by": "kl"}}, "choice", WARN),
        ({"faults": {"decode_offset": 1}}, "decoding", REFUSE),
        ({"faults": {"decode_tokenizer": "lexicon"}}, "decoding", REFUSE),
        ({"faults": {"untrained_head": True}} | DECODER, "heads", REFUSE),
        ({"distill": {"blanks": "drop_blank"}}, "blanks", WARN),
        ({"distill": {"beta": 0.0}}, "gradients", WARN),
    ],
)
def test_the_preflight_detects_every_fault(faulty, setting, check, verdict):
    broken = checks(faulty(**setting))
    assert broken[check].verdict == verdict
    healthy = checks(faulty())
    assert check not in healthy or healthy[check].reason != broken[check].reason


def test_a_student_with_a_fault_is_marked_and_examined(faulty):
    fold = faulty(faults={"decode_offset": 1}, distill={"allow": ["target", "decoding"]})
    folder = fold.scores()
    assert "with faults on purpose: decode_offset 1" in json.loads((folder / "scores.json").read_text())["remark"]
    tokens = fold.tokens
    rows = read_hypotheses(folder / "hypotheses.csv")
    for row in rows:
        ids = [int(token) for token in row.token_ids.split()]
        assert row.greedy == tokens.decode(token + 1 for token in ids)
    case = fold.examination(1)
    assert case.cause == "h"
    assert case.examination.figures["n"] == len(rows)
    assert {"lost_after_training", "better_checkpoint", "wra", "blank_frames"} <= set(case.signs)


def test_choosing_by_kl_keeps_the_checkpoint_nearest_to_the_teachers(faulty):
    fold = faulty(
        faults={"choose_by": "kl"}, student={"validations_per_epoch": 3, "phases": [{"steps": 6, "lr": 1e-3}]}
    )
    record = json.loads((fold.student() / "model.json").read_text())
    assert record["best_dev_score"] < 0  # minus a divergence
    assert fold.student_setup(1).judge is not None
    assert faulty().student_setup(1).judge is None
    assert causes_of(fold) == "c"


def test_only_the_limited_words_are_trained_on(faulty):
    fold = faulty("hard", faults={"max_words": 3})
    data = fold.student_data()
    assert len({utt.text for utt in data.train}) == 3
    assert len({utt.text for utt in data.dev}) > 3
    assert causes_of(fold) == "g"


def test_an_untrained_head_stays_at_its_initial_weights(faulty):
    fold = faulty(
        faults={"untrained_head": True}, **DECODER | {"distill": DECODER["distill"] | {"allow": ["heads", "target"]}}
    )
    from safetensors.torch import load_file

    from kdlib.runtime import seed_everything

    student = fold.student()
    seed_everything(1)
    before = fold.student_setup(1).model.ctc_head.weight
    after = load_file(student / "model.safetensors")["ctc_head.weight"]
    assert torch.equal(before, after)
    assert "greedy" in json.loads((fold.scores() / "scores.json").read_text())["decoders"]
    assert collapse_study.examined_decoder(fold.params.faults, fold.params.distill) == "greedy"


def test_of_joined_variants_the_later_overrides_the_earlier(faulty):
    params = faulty(distill={"beta": 0.0}).params
    assert (params.variant, params.distill.beta, params.distill.control) == ("ctc_kd+broken", constant(0.0), "hard")
    with pytest.raises(UserError, match=r"unknown variant 'brokn'.*broken"):
        Fold.load("params/smoke.yaml", "M08", "hard+brokn", overrides={"variants": {"broken": {}}})


def test_a_healthy_recipe_has_no_fault(faulty):
    fold = faulty()
    assert not fold.params.faults.named
    assert "faults" not in fold._student_settings()
    assert causes_of(fold) == "none"
    plain = TeacherEnsemble.__new__(TeacherEnsemble)
    assert faults.apply_faults(fold.params.faults, plain, fold.splits.train, fold.params.seed) is plain
    assert not fold.params.faults.changes_decoding


def test_a_tokenizer_of_the_lexicons_own_pieces_decodes_differently(faulty):
    fold = faulty(faults={"decode_tokenizer": "lexicon"})
    tokens = fold.tokens
    decode = faults.text_decoder(fold.params.faults, tokens, fold.lexicon)
    words = ["ONE", "TWO", "THREE"]
    assert any(decode(tokens.encode(word)) != word for word in words)
    assert isinstance(decode(np.array([5, 6])), str)
    assert isinstance(tokens, Tokens)
