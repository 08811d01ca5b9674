import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from kdlib.corpus import inputs
from kdlib.errors import UserError
from kdlib.models.nemo_files import SHIPPED_MODEL, NeMoCTC, find_model, restore_model
from kdlib.pipeline import Fold


@pytest.fixture(scope="module")
def shipped():
    return NeMoCTC(SHIPPED_MODEL)


def test_the_shipped_model_is_small_and_real(shipped):
    assert SHIPPED_MODEL.stat().st_size < 5_000_000
    assert type(shipped.model).__name__ == "EncDecCTCModelBPE"
    assert sum(weight.numel() for weight in shipped.model.parameters()) == pytest.approx(0.95e6, rel=0.02)
    assert not shipped.model.training


def test_outputs_have_their_shapes(shipped):
    outputs = shipped(torch.randn(2, 16_000), torch.tensor([16_000, 8_000]))
    assert outputs.ctc.logits.shape == (2, 25, shipped.tokens.size)  # 40 ms per frame
    assert outputs.lengths.tolist() == [25, 13]
    assert outputs.encoded.shape == (2, 25, 96)


def test_padding_changes_no_output(shipped, corpus):
    pair = sorted(corpus, key=lambda utt: utt.duration_s)[:: len(corpus) - 1]
    both = shipped(*inputs.collate(pair))
    alone = shipped(*inputs.collate(pair[:1]))
    frames = int(alone.lengths[0])
    assert both.lengths[0] == frames
    assert torch.allclose(both.ctc.logits[0, :frames], alone.ctc.logits[0], atol=1e-3)


def test_a_saved_model_restores_to_the_same_outputs(shipped, tmp_path):
    shipped.model.save_to(str(tmp_path / "again.nemo"))
    restored = NeMoCTC(tmp_path / "again.nemo")
    samples, lengths = torch.randn(1, 16_000), torch.tensor([16_000])
    assert torch.equal(restored(samples, lengths).ctc.logits, shipped(samples, lengths).ctc.logits)
    assert restored.tokens.fingerprint == shipped.tokens.fingerprint


@pytest.mark.parametrize("size", [0, 1000, 200_000, 0.99])
def test_a_truncated_file_has_one_message(tmp_path, size):
    content = SHIPPED_MODEL.read_bytes()
    short = tmp_path / "short.nemo"
    short.write_bytes(content[: int(size * len(content)) if isinstance(size, float) else size])
    with pytest.raises(UserError, match=r"short\.nemo") as caught:
        restore_model(short)
    assert "\n" not in str(caught.value)
    assert "make it again" in str(caught.value)


def test_another_file_is_rejected(tmp_path):
    (tmp_path / "text.nemo").write_text("not a model")
    with pytest.raises(UserError, match=r"not a complete \.nemo file"):
        restore_model(tmp_path / "text.nemo")


def test_a_missing_path_has_a_message_with_the_alternatives():
    fold = Fold.load("params/demo.yaml", "M08", overrides={"pretrained": "nemo", "nemo_model": "models/none.nemo"})
    with pytest.raises(UserError, match=r"there is no file .*models/none\.nemo; correct the path"):
        find_model(fold.pretrained_settings)


def test_a_local_file_is_used_directly():
    overrides = {"pretrained": "nemo", "nemo_model": str(SHIPPED_MODEL)}
    assert find_model(Fold.load("params/demo.yaml", "M08", overrides=overrides).pretrained_settings) == SHIPPED_MODEL


def test_without_a_network_the_message_has_both_alternatives(monkeypatch, tmp_path):
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")  # no server there
    fold = Fold.load("params/demo.yaml", "M08", overrides={"pretrained": "nemo"})
    with pytest.raises(UserError) as caught:
        find_model(fold.pretrained_settings)
    assert "nemo_model: path/to/it.nemo" in str(caught.value)
    assert "pretrained: shipped" in str(caught.value)


def test_importing_kdlib_loads_no_heavy_library():
    program = "import kdlib, sys; print([name for name in ('torch', 'nemo', 'numpy', 'pandas') if name in sys.modules])"
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"


def test_nemo_prints_nothing_on_import():
    program = "from kdlib.models.nemo_files import SHIPPED_MODEL, NeMoCTC; NeMoCTC(SHIPPED_MODEL); print('quiet')"
    run = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, env={**os.environ}
    )
    assert run.stdout.strip() == "quiet"
    for line in ("OneLogger", "exporters", "NeMo W", "NeMo I"):
        assert line not in run.stderr
    assert Path(SHIPPED_MODEL).is_file()


def test_a_saved_model_contains_no_local_path(small_model):
    import tarfile

    for path in (SHIPPED_MODEL, small_model):
        with tarfile.open(path) as archive:
            (config,) = [member for member in archive if member.name.endswith("model_config.yaml")]
            text = archive.extractfile(config).read().decode()
        assert "dir: tokens" in text
        assert str(small_model.parents[2]) not in text
