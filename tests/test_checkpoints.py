"""Models of other code as teachers: SpeechBrain experiments, NeMo's files and Hugging Face's folders."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from kdlib.errors import UserError
from kdlib.models import hybrid
from kdlib.models.decoder import teacher_forced
from kdlib.pipeline import Fold
from kdlib.teachers import checkpoints
from kdlib.teachers.hyperparams import Hyperparams
from kdlib.tokens import Tokens

HYPERPARAMS = """
seed: 7775
__set_seed: !apply:torch.manual_seed [!ref <seed>]
output_folder: !ref results/conformer/<seed>
data_folder: !PLACEHOLDER
sample_rate: 16000
n_fft: 400
n_mels: 20
d_model: 16
nhead: 2
num_encoder_layers: 2
num_decoder_layers: 1
d_ffn: !ref <d_model> * 2
transformer_dropout: 0.0
activation: !name:torch.nn.GELU
output_neurons: {size}
blank_index: 0
bos_index: 1
eos_index: 2
compute_features: !new:speechbrain.lobes.features.Fbank
    sample_rate: !ref <sample_rate>
    n_fft: !ref <n_fft>
    n_mels: !ref <n_mels>
normalize: !new:speechbrain.processing.features.InputNormalization
    norm_type: global
    update_until_epoch: 4
CNN: !new:speechbrain.lobes.models.convolution.ConvolutionFrontEnd
    input_shape: (8, 10, 20)
    num_blocks: 2
    num_layers_per_block: 1
    out_channels: (8, 4)
    kernel_sizes: (3, 3)
    strides: (2, 2)
    residuals: (False, False)
Transformer: !new:speechbrain.lobes.models.transformer.TransformerASR.TransformerASR
    input_size: 20
    tgt_vocab: !ref <output_neurons>
    d_model: !ref <d_model>
    nhead: !ref <nhead>
    num_encoder_layers: !ref <num_encoder_layers>
    num_decoder_layers: !ref <num_decoder_layers>
    d_ffn: !ref <d_ffn>
    dropout: !ref <transformer_dropout>
    activation: !ref <activation>
    encoder_module: conformer
    attention_type: RelPosMHAXL
    normalize_before: True
    causal: False
ctc_lin: !new:speechbrain.nnet.linear.Linear
    input_size: !ref <d_model>
    n_neurons: !ref <output_neurons>
seq_lin: !new:speechbrain.nnet.linear.Linear
    input_size: !ref <d_model>
    n_neurons: !ref <output_neurons>
model: !new:torch.nn.ModuleList
    - [!ref <CNN>, !ref <Transformer>, !ref <seq_lin>, !ref <ctc_lin>]
"""


def experiment(folder: Path, tokens: Tokens, seed: int = 0) -> dict:
    """An experiment written by SpeechBrain's own classes; what its HyperPyYAML made of the file."""
    from hyperpyyaml import load_hyperpyyaml
    from speechbrain.utils.checkpoints import Checkpointer

    folder.mkdir(parents=True)
    text = HYPERPARAMS.replace("{size}", str(tokens.size))
    (folder / "hyperparams.yaml").write_text(text)
    made = load_hyperpyyaml(text, {"data_folder": "/data", "seed": seed})
    torch.manual_seed(seed)
    made["normalize"].train()
    made["normalize"](made["compute_features"](torch.randn(2, 16000) / 10), torch.ones(2), epoch=0)
    made["model"].eval()
    saver = Checkpointer(folder / "save", {"model": made["model"], "normalizer": made["normalize"]})
    saver.save_and_keep_only(meta={"WER": 50.0 + seed}, min_keys=["WER"])
    (folder / "save" / "tokenizer.ckpt").write_bytes(tokens.model)
    return made


@pytest.fixture(scope="module")
def tokens(smoke) -> Tokens:
    return smoke.tokens


@pytest.fixture(scope="module")
def study(tokens, tmp_path_factory) -> tuple[Path, dict]:
    """A folder of three teachers, as a study has them, and what SpeechBrain made for each."""
    root = tmp_path_factory.mktemp("experiments")
    return root, {
        name: experiment(root / f"conformer_{name}" / "7775", tokens, place)
        for place, name in enumerate(("M04", "M08", "M10"))
    }


def fold_of(folder: Path, outputs: Path, **teacher) -> Fold:
    settings = {"source": "checkpoints", "folder": str(folder)} | teacher
    return Fold.load(
        "params/smoke.yaml", "M08", overrides={"outputs": str(outputs), "name": "lent", "teacher": settings}
    )


def test_a_converted_experiment_gives_what_speechbrain_gives(study, tokens, tmp_path):
    """CTC and decoder logits of two recordings of different length, at the ids that tokens have here."""
    root, made = study
    found = checkpoints.Checkpoint("speechbrain", root / "conformer_M04/7775/hyperparams.yaml", ("M04",))
    checkpoints.convert(tmp_path, found, tokens)
    model = hybrid.load(tmp_path)[0].eval()
    theirs, waves = made["M04"], [torch.randn(length) / 10 for length in (16000, 9123)]
    places = [1, 2, 0, *range(3, tokens.size)]
    text = [5, 7, 9]
    batch = torch.nn.utils.rnn.pad_sequence(waves, batch_first=True)
    with torch.no_grad():
        given = teacher_forced([text, text])[0]
        outputs = model(batch, torch.tensor([len(wave) for wave in waves]), given)
        for row, wave in enumerate(waves):
            features = theirs["normalize"](theirs["compute_features"](wave[None]), torch.ones(1), epoch=99)
            hidden = theirs["Transformer"].encode(theirs["CNN"](features), torch.ones(1))
            ctc = theirs["ctc_lin"](hidden)[0][:, places]
            length = int(outputs.ctc.lengths[row])
            assert len(ctc) == length
            assert (outputs.ctc.logits[row, :length] - ctc).abs().max() < 1e-4
            decoded, _ = theirs["Transformer"].decode(torch.tensor([[1, *text]]), hidden)
            step = theirs["seq_lin"](decoded)[0][:, places]
            assert (outputs.decoder_logits[row] - step).abs().max() < 1e-4


def test_the_order_of_the_modules_is_read_from_a_file_that_speechbrain_saved(study, tmp_path):
    """It writes the references resolved: anchors of YAML. Heads in another order have the same shape."""
    from hyperpyyaml import resolve_references

    root, _ = study
    text = (root / "conformer_M04/7775/hyperparams.yaml").read_text()
    swapped = text.replace("!ref <seq_lin>, !ref <ctc_lin>", "!ref <ctc_lin>, !ref <seq_lin>")
    path = tmp_path / "hyperparams.yaml"
    for written, order in ((text, ["seq_lin", "ctc_lin"]), (swapped, ["ctc_lin", "seq_lin"])):
        path.write_text(resolve_references(written, {"data_folder": "/data"}).getvalue())
        assert Hyperparams(path).order("model") == ["CNN", "Transformer", *order]
        path.write_text(written)
        assert Hyperparams(path).order("model") == ["CNN", "Transformer", *order]


def test_a_fold_is_distilled_from_converted_experiments(study, tmp_path):
    fold = fold_of(study[0], tmp_path)
    assert fold.target_teachers() == ["M04"]
    fold.target_report()
    assert fold.of("ctc_kd").scores(1)
    live = fold.of("ctc_kd").but(distill={"live_teachers": True})
    assert live._sources()[0]["ctc"].logits


def test_hyperparams_are_read_and_never_run(tmp_path):
    path = tmp_path / "hyperparams.yaml"
    path.write_text(
        "a: 4\nb: !ref <a> * 3 - 2\nc: !apply:os.system ['touch x']\nd: !ref results/<a>\ne: (1, 2)\n"
        "f: [!ref <a>, 5]\ng: !ref <f[0]>\n"
    )
    given = Hyperparams(path)
    assert [given.get(name) for name in "abdefg"] == [4, 10, "results/4", [1, 2], [4, 5], 4]
    assert given.get("c").of == "os.system"
    path.write_text("a: !ref <b>\nb: !ref <a>\n")
    with pytest.raises(UserError, match="lead to each other"):
        Hyperparams(path).get("a")
    path.write_text("a: !ref <nothing>\n")
    with pytest.raises(UserError, match="refers to <nothing>"):
        Hyperparams(path).get("a")


def test_a_pickle_in_place_of_weights_is_not_run(study, tokens, tmp_path):
    copied = tmp_path / "M04"
    shutil.copytree(study[0] / "conformer_M04" / "7775", copied)
    path = next(copied.glob("save/CKPT+*/model.ckpt"))

    class Bad:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "run",))

    torch.save({"x": Bad()}, path)
    with pytest.raises(UserError, match="cannot be read as weights"):
        checkpoints.convert(
            tmp_path, checkpoints.Checkpoint("speechbrain", copied / "hyperparams.yaml", ("M04",)), tokens
        )
    assert not (tmp_path / "run").exists()


def edited(path: Path, old: str, new: str) -> None:
    path.write_text(path.read_text().replace(old, new))


BAD = {
    "other size": (lambda e: edited(e / "hyperparams.yaml", "d_model: 16", "d_model: 24"), "has the shape"),
    "other vocabulary": (
        lambda e: edited(e / "hyperparams.yaml", "output_neurons: ", "output_neurons: 1"),
        "tokens, but",
    ),
    "other tokenizer": (lambda e: (e / "save/tokenizer.ckpt").write_bytes(b"other"), "another tokenizer"),
    "no checkpoint": (lambda e: shutil.rmtree(e / "save"), "no checkpoint of SpeechBrain"),
    "no normaliser": (lambda e: next(e.glob("save/*/normalizer.ckpt")).unlink(), "no normalizer.ckpt"),
    "no YAML": (lambda e: (e / "hyperparams.yaml").write_text("a: [1"), "not valid YAML"),
    "another recipe": (
        lambda e: edited(e / "hyperparams.yaml", "TransformerASR.TransformerASR", "CRDNN.CRDNN"),
        "no TransformerASR",
    ),
    "unknown activation": (
        lambda e: edited(e / "hyperparams.yaml", "torch.nn.GELU", "own.code.Act"),
        "unknown activation",
    ),
    "another rate": (lambda e: edited(e / "hyperparams.yaml", "sample_rate: 16000", "sample_rate: 8000"), "8000 Hz"),
    "of nobody": (
        lambda e: e.parent.rename(e.parents[1] / "best"),
        "best does not say whom this teacher was trained on",
    ),
    "two of one": (lambda e: shutil.copytree(e, e.parent / "7776"), "several experiments"),
}


@pytest.mark.parametrize("case", BAD)
def test_models_that_do_not_fit_are_refused_in_a_sentence(study, tmp_path, case):
    change, message = BAD[case]
    shutil.copytree(study[0] / "conformer_M04", tmp_path / "models" / "conformer_M04")
    change(tmp_path / "models" / "conformer_M04" / "7775")
    fold = fold_of(tmp_path / "models", tmp_path / "outputs")
    with pytest.raises(UserError, match=message):
        fold.teacher("M04")


def test_a_nemo_file_is_a_teacher(smoke, tmp_path):
    (tmp_path / "models").mkdir()
    shutil.copyfile(smoke.pretrained_model(), tmp_path / "models" / "M04.nemo")
    fold = fold_of(tmp_path / "models", tmp_path / "outputs")
    assert fold.target_teachers() == ["M04"]
    assert fold.outputs("M04", "training")


def test_a_hugging_face_model_is_a_teacher_over_its_characters(tmp_path):
    transformers = pytest.importorskip("transformers")
    folder = tmp_path / "models" / "M04"
    torch.manual_seed(0)
    letters = ["<pad>", "<s>", "</s>", "<unk>", "|", *"ETAONIHSRDLUMWCFGYPBVK'XJQZ-"]
    config = transformers.Wav2Vec2Config(
        vocab_size=len(letters),
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        conv_dim=(8,) * 7,
        num_conv_pos_embeddings=128,
        num_conv_pos_embedding_groups=16,
        pad_token_id=0,
    )
    theirs = transformers.Wav2Vec2ForCTC(config).eval()
    theirs.save_pretrained(folder)
    (folder / "vocab.json").write_text(json.dumps({letter: place for place, letter in enumerate(letters)}))
    overrides = {"outputs": str(tmp_path / "outputs"), "name": "hf", "tokens": {"source": str(folder)}}
    overrides["teacher"] = {"source": "checkpoints", "folder": str(folder.parent)}
    fold = Fold.load("params/smoke.yaml", "M08", overrides=overrides)
    model, tokens, _ = hybrid.load(fold.teacher("M04"))
    assert tokens.decode(tokens.encode("ZERO ONE")) == "ZERO ONE"
    wave = torch.randn(1, 16000) / 10
    with torch.no_grad():
        ours = model.eval()(wave, torch.tensor([16000])).ctc.logits[0]
        logits = theirs(wave).logits[0]
    for place, piece in enumerate(tokens.pieces):
        if piece in letters[5:]:
            assert (ours[:, place] - logits[:, letters.index(piece)]).abs().max() < 1e-3
    assert (ours[:, tokens.blank] - logits[:, 0]).abs().max() < 1e-3
