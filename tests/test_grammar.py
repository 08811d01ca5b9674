from collections import Counter

from kdlib.corpus.embedded import grammar, synthetic
from kdlib.corpus.importers.uaspeech import word_list
from kdlib.settings.corpus import Synthetic, WordCounts

NONE = WordCounts(digits=0, computer=0, common=0)


def test_sentences_have_three_to_six_words_of_the_list():
    words = set(word_list().values())
    for texts in grammar.sentences().values():
        for text in texts:
            assert 3 <= len(text.split()) <= 6, text
            assert set(text.split()) <= words, text


def test_no_sentence_is_in_two_blocks_but_every_word_is_in_all():
    blocks = grammar.sentences()
    assert max(Counter(text for texts in blocks.values() for text in texts).values()) == 1
    words = [{word for text in texts for word in text.split()} for texts in blocks.values()]
    assert words[0] == words[1] == words[2]
    assert min(map(len, blocks.values())) >= 400  # the maximum of a recipe


def test_every_speaker_has_other_sentences():
    settings = Synthetic(speakers=("M08", "M10"), words=NONE, sentences=20, controls=2, control_words=5)
    prompts = synthetic.make_prompts(settings)
    pairs = {name: {(prompt.block, prompt.word) for prompt in prompts[name]} for name in ("M08", "M10")}
    for name, texts in pairs.items():
        assert Counter(block for block, _ in texts) == {"B1": 20, "B2": 20, "B3": 20}
        assert all(text in grammar.sentences()[block] for block, text in texts), name
    assert len(pairs["M08"] & pairs["M10"]) < 10
    assert prompts == synthetic.make_prompts(settings)
