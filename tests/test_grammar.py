from collections import Counter

from kdlib.corpus.embedded import grammar, synthetic
from kdlib.corpus.importers.uaspeech import word_list
from kdlib.settings import Synthetic, WordCounts

NONE = WordCounts(digits=0, computer=0, common=0)


def test_sentences_have_three_to_six_words_of_the_list():
    words = set(word_list().values())
    for some in grammar.sentences().values():
        for text in some:
            assert 3 <= len(text.split()) <= 6, text
            assert set(text.split()) <= words, text


def test_no_sentence_is_in_two_blocks_but_every_word_is_in_all():
    blocks = grammar.sentences()
    assert max(Counter(text for some in blocks.values() for text in some).values()) == 1
    words = [{word for text in some for word in text.split()} for some in blocks.values()]
    assert words[0] == words[1] == words[2]
    assert min(map(len, blocks.values())) >= 400  # as many as a recipe may ask for


def test_every_speaker_says_sentences_of_his_own():
    plan = synthetic.make_prompts(
        Synthetic(speakers=("M08", "M10"), words=NONE, sentences=20, controls=2, control_words=5)
    )
    said = {name: {(one.block, one.word) for one in plan[name]} for name in ("M08", "M10")}
    for name, some in said.items():
        assert Counter(block for block, _ in some) == {"B1": 20, "B2": 20, "B3": 20}
        assert all(text in grammar.sentences()[block] for block, text in some), name
    assert len(said["M08"] & said["M10"]) < 10
    assert plan == synthetic.make_prompts(
        Synthetic(speakers=("M08", "M10"), words=NONE, sentences=20, controls=2, control_words=5)
    )
