import numpy as np
import pytest
import soundfile

from kdlib.corpus import audio, inputs
from kdlib.corpus.audio_checks import ADVICE, CHECKED_FILES, UNREADABLE, _fault, check_recordings
from kdlib.corpus.manifest import Corpus
from kdlib.corpus.utterances import Utterance
from kdlib.errors import UserError
from kdlib.settings.corpus import AudioChecks


def utterance(path, name="a"):
    return Utterance(name, "S", path, 1.0, "ONE")


def tone(path, rate=16_000, channels=1, hz=440.0, seconds=0.5):
    wave = 0.3 * np.sin(2 * np.pi * hz * np.arange(int(rate * seconds)) / rate)
    soundfile.write(path, np.stack([wave] * channels, axis=1), rate)
    return path


@pytest.mark.parametrize(("rate", "channels", "kind"), [(8_000, 2, "flac"), (44_100, 1, "wav"), (16_000, 2, "wav")])
def test_any_rate_and_channel_count_becomes_16_khz_mono(tmp_path, rate, channels, kind):
    samples = audio.load(utterance(tone(tmp_path / f"a.{kind}", rate, channels)))
    assert samples.ndim == 1
    assert abs(len(samples) - 8_000) <= 1
    spectrum = np.abs(np.fft.rfft(samples))
    assert spectrum.argmax() * 16_000 / len(samples) == pytest.approx(440, abs=3)


def test_resampling_leaves_no_mirror_image_in_the_new_band(tmp_path):
    """3,600 Hz at a rate of 8,000 Hz must not come back at 4,400 Hz: 50 dB below at least."""
    samples = audio.load(utterance(tone(tmp_path / "a.wav", 8_000, hz=3_600, seconds=1.0)))
    spectrum = np.abs(np.fft.rfft(samples * np.hanning(len(samples))))
    hz = np.fft.rfftfreq(len(samples), 1 / 16_000)
    image, voice = spectrum[(hz > 4_100) & (hz < 5_000)].max(), spectrum[(hz > 3_500) & (hz < 3_700)].max()
    assert 20 * np.log10(image / voice) < -50


def test_the_report_notes_a_conversion_once(tmp_path):
    files = [utterance(tone(tmp_path / f"{name}.wav", 8_000, 2), name) for name in "abc"]
    _, report = check_recordings(Corpus((*files, utterance(tone(tmp_path / "d.wav"), "d"))))
    assert report.converted == {"8000 Hz, 2 channels": 3}
    assert "3 files of 8000 Hz, 2 channels are read as 16000 Hz mono" in str(report)


FAULTS = {
    "no samples in it": np.zeros(0),
    "nothing but silence": np.zeros(800),
    "NaN or infinite samples": np.array([0.1, np.nan, 0.2] * 300),
    "clipped to nothing": np.sign(np.sin(np.arange(1600) / 5)) * 1.0,
}


@pytest.mark.parametrize("reason", FAULTS)
def test_bad_samples_are_left_out_and_named(tmp_path, reason):
    soundfile.write(tmp_path / "bad.wav", FAULTS[reason], 16_000, subtype="FLOAT")
    corpus = Corpus((utterance(tmp_path / "bad.wav", "bad"), utterance(tone(tmp_path / "ok.wav"), "ok")))
    kept, report = check_recordings(corpus)
    assert [utt.utt_id for utt in kept] == ["ok"]
    assert [(problem.utt_id, problem.speaker, problem.reason) for problem in report.problems] == [("bad", "S", reason)]


@pytest.mark.parametrize(
    ("content", "reason"), [(None, "the file is missing"), (b"RIFF", "the file cannot be read as audio")]
)
def test_unreadable_files_are_left_out_and_named(tmp_path, content, reason):
    if content is not None:
        (tmp_path / "bad.wav").write_bytes(content)
    kept, report = check_recordings(
        Corpus((utterance(tmp_path / "bad.wav", "bad"), utterance(tone(tmp_path / "ok.wav"), "ok")))
    )
    assert len(kept) == 1
    assert report.problems[0].reason == reason
    report.write(tmp_path / "left_out.csv")
    assert (tmp_path / "left_out.csv").read_text().splitlines()[1] == f"bad,S,{tmp_path / 'bad.wav'},{reason}"


def test_loud_speech_is_not_called_clipped(tmp_path):
    wave = np.clip(1.3 * np.sin(np.arange(16_000) / 9), -1, 1)
    soundfile.write(tmp_path / "a.wav", wave, 16_000)
    kept, _ = check_recordings(Corpus((utterance(tmp_path / "a.wav"),)))
    assert len(kept) == 1


def test_clipped_recordings_are_used_and_counted_by_speaker(tmp_path):
    """At 1.5 % of the samples a recording counts, at .5 % it does not; with more than half the file is left out."""

    def recording(name, speaker, share):
        wave = 0.5 * np.sin(np.arange(20_000) / 9)
        wave[: round(share * 20_000)] = 1.0
        soundfile.write(tmp_path / f"{name}.wav", wave, 16_000)
        return Utterance(name, speaker, tmp_path / f"{name}.wav", 1.25, "ONE")

    shares = {"a1": 0.015, "a2": 0.005, "b1": 0.02, "b2": 0.3, "b3": 0.0, "b4": 0.6, "c1": 0.0}
    corpus = Corpus(tuple(recording(name, name[0].upper(), share) for name, share in shares.items()))
    for _ in range(2):  # the second time from the saved results
        kept, report = check_recordings(corpus, folder=tmp_path)
        assert [utt.utt_id for utt in kept] == ["a1", "a2", "b1", "b2", "b3", "c1"]
        assert [(problem.utt_id, problem.reason) for problem in report.problems] == [("b4", "clipped to nothing")]
        (note,) = [line for line in str(report).splitlines() if "at full scale" in line]
        assert note.startswith("note: recordings with more than 1 % of their samples at full scale (clipped)")
        assert ": B 2 of 3, A 1 of 2;" in note
        assert "C " not in note


def test_a_corpus_without_clipping_has_no_line_about_it(tmp_path):
    _, report = check_recordings(Corpus((utterance(tone(tmp_path / "a.wav")),)))
    assert "full scale" not in str(report)


def test_a_corpus_without_a_usable_file_is_refused(tmp_path):
    with pytest.raises(UserError, match="none of its 1 audio files can be used"):
        check_recordings(Corpus((utterance(tmp_path / "none.wav"),)))


def test_batches_contain_every_utterance_once_and_follow_the_seed(tmp_path):
    utterances = [Utterance(str(index), "S", tmp_path, 0.1 + index % 7, "ONE") for index in range(50)]
    first, again, different = (list(audio.batches(utterances, 8, seed=seed)) for seed in (1, 1, 2))
    assert first == again != different
    assert sorted(utt.utt_id for batch in first for utt in batch) == sorted(utt.utt_id for utt in utterances)


def test_collate_pads_and_keeps_lengths(tmp_path):
    pair = [utterance(tone(tmp_path / "a.wav", seconds=0.5)), utterance(tone(tmp_path / "b.wav", seconds=0.25))]
    samples, lengths = inputs.collate(pair)
    assert tuple(samples.shape) == (2, 8_000)
    assert lengths.tolist() == [8_000, 4_000]
    assert samples[1, 4_000:].abs().max() == 0


def test_files_too_short_for_any_word_are_left_out(tmp_path):
    corpus = Corpus((utterance(tone(tmp_path / "a.wav", seconds=0.05), "a"), utterance(tone(tmp_path / "b.wav"), "b")))
    kept, report = check_recordings(corpus)
    assert [utt.utt_id for utt in kept] == ["b"]
    assert report.problems[0].reason == "too short to hold speech"


def speech(path, rate=16_000, before=0.5, voiced=0.6, after=0.7):
    """Noise between two stretches of faint noise."""
    rng = np.random.default_rng(0)
    parts = [(before, 1e-4), (voiced, 0.2), (after, 1e-4)]
    soundfile.write(path, np.concatenate([rng.normal(0, level, int(seconds * rate)) for seconds, level in parts]), rate)
    return path


def test_silence_is_trimmed_if_set_and_a_margin_stays(tmp_path):
    corpus = Corpus((utterance(speech(tmp_path / "a.wav"), "a"),))
    whole, _ = check_recordings(corpus)
    assert whole.utterances[0].offset_s is None
    assert len(audio.load(whole.utterances[0])) == 1.8 * 16_000
    trimmed, _ = check_recordings(corpus, AudioChecks(trim_silence=True))
    only = trimmed.utterances[0]
    assert only.offset_s == pytest.approx(0.5 - audio.MARGIN_S, abs=0.021)
    assert only.duration_s == pytest.approx(0.6 + 2 * audio.MARGIN_S, abs=0.041)
    assert len(audio.load(only)) == pytest.approx(only.duration_s * 16_000, abs=1)


def test_only_the_given_part_of_a_file_is_read(tmp_path):
    """As in NeMo manifests with an offset; at another rate, so that frames and seconds cannot be mixed up."""
    wave = np.concatenate([np.full(8000, 0.1), np.full(4000, 0.4), np.full(4000, 0.2)])
    soundfile.write(tmp_path / "long.wav", wave, 8000)
    part = Utterance("p", "S", tmp_path / "long.wav", 0.5, "ONE", offset_s=1.0)
    samples = audio.load(part)
    assert len(samples) == 8000
    assert np.median(samples) == pytest.approx(0.4, abs=0.01)
    beyond = Utterance("q", "S", tmp_path / "long.wav", 0.5, "ONE", offset_s=1.9)
    kept, report = check_recordings(Corpus((part, beyond)))
    assert [utt.utt_id for utt in kept] == ["p"]
    assert report.problems[0].reason == "the file ends before the part that the manifest names"


def test_trimming_stays_within_the_part_that_a_manifest_names(tmp_path):
    part = Utterance("p", "S", speech(tmp_path / "a.wav"), 1.0, "ONE", offset_s=0.3)
    kept, _ = check_recordings(Corpus((part,)), AudioChecks(trim_silence=True))
    only = kept.utterances[0]
    assert only.offset_s == pytest.approx(0.4, abs=0.021)
    assert only.offset_s + only.duration_s == pytest.approx(1.2, abs=0.041)


def test_two_channels_that_cancel_each_other_are_silence(tmp_path):
    wave = 0.3 * np.sin(np.arange(8000) / 9)
    soundfile.write(tmp_path / "bad.wav", np.stack([wave, -wave], 1), 16_000, subtype="FLOAT")
    _, report = check_recordings(
        Corpus((utterance(tmp_path / "bad.wav", "bad"), utterance(tone(tmp_path / "ok.wav"), "ok")))
    )
    assert report.problems[0].reason == "nothing but silence"


def test_a_transcript_longer_than_the_audio_can_hold_is_left_out(tmp_path):
    """30 letters per second are twice the highest rate of speech."""
    fits = Utterance("fits", "S", tone(tmp_path / "a.wav", seconds=1.0), 1.0, "A" * 30)
    long = Utterance("long", "S", tone(tmp_path / "b.wav", seconds=1.0), 1.0, "A" * 31)
    kept, report = check_recordings(Corpus((fits, long)))
    assert [utt.utt_id for utt in kept] == ["fits"]
    assert report.problems[0].reason == "far too short for its transcript"
    assert len(check_recordings(Corpus((fits, long)), AudioChecks(max_letters_per_s=40.0))[0]) == 2


def test_results_of_another_version_of_the_check_are_ignored(tmp_path):
    corpus = Corpus((utterance(tone(tmp_path / "a.wav"), "a"),))
    check_recordings(corpus, folder=tmp_path)
    path = tmp_path / CHECKED_FILES
    path.write_text(path.read_text().replace("examined by ", "examined by another ").replace(",0.5,", ",7.5,"))
    kept, _ = check_recordings(corpus, folder=tmp_path)
    assert kept.utterances[0].duration_s == 0.5


@pytest.mark.parametrize("rate", [22_254, 44_101, 11_127])
def test_odd_rates_need_no_filters_of_gigabytes(tmp_path, rate):
    samples = audio.load(utterance(tone(tmp_path / "a.wav", rate, hz=440)))
    spectrum = np.abs(np.fft.rfft(samples))
    assert spectrum.argmax() * 16_000 / len(samples) == pytest.approx(440, abs=3)


def test_rates_and_levels_that_cannot_be_speech_are_named(tmp_path):
    good = utterance(tone(tmp_path / "ok.wav"), "ok")
    soundfile.write(tmp_path / "slow.wav", np.ones(4000) / 3, 40)
    wave = 9000 * np.sin(np.arange(8000) / 9)
    soundfile.write(tmp_path / "ints.wav", wave, 16_000, subtype="FLOAT")
    bad = (utterance(tmp_path / "slow.wav", "slow"), utterance(tmp_path / "ints.wav", "ints"))
    _, report = check_recordings(Corpus((good, *bad)))
    reasons = [problem.reason for problem in report.problems]
    assert reasons == ["a sample rate below 4,000 Hz", "samples far beyond full scale"]


def test_every_reason_comes_with_advice():
    reasons = {_fault(np.array(samples)) for samples in ([], [np.nan], [0.0], [9.0], [1.0])} | {UNREADABLE}
    assert reasons <= set(ADVICE)


def test_files_with_impossible_paths_are_missing(tmp_path):
    good = utterance(tone(tmp_path / "ok.wav"), "ok")
    _, report = check_recordings(Corpus((good, utterance(tmp_path / ("x" * 300), "long"))))
    assert report.problems[0].reason == "the file is missing"
