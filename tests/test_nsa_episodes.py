"""Episodes and windows of a text are functions of their numbers, and well formed."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from anchors.errors import AnchorsError
from anchors.nsa.training.data import Windows
from anchors.nsa.training.episodes import LABEL, PREFIX, SEPARATOR, WORD, Episodes
from anchors.nsa.training.vocabulary import BEGIN, COLON, SEMICOLON, Vocabulary, bytes_tokenizer
from anchors.tasks.prompts import QUERY

SMALL = Episodes(
    tokens=64, classes=(2, 3), words=(2, 4), keywords=2, vocabulary=Vocabulary(label_words=8, words=32)
)


episodes = st.builds(
    Episodes,
    tokens=st.integers(40, 200),
    classes=st.tuples(st.integers(2, 4), st.integers(4, 6)),
    words=st.tuples(st.integers(1, 3), st.integers(3, 8)),
    keywords=st.integers(1, 4),
    keyword_rate=st.floats(0, 1),
    burstiness=st.floats(0, 1),
    recent=st.integers(1, 9),
    skew=st.floats(0, 3),
    vocabulary=st.just(Vocabulary(label_words=8, words=64)),
)


@settings(deadline=None, max_examples=60)
@given(episodes, st.integers(0, 2**40), st.integers(0, 2**40), st.booleans())
def test_an_episode_is_a_function_of_seed_and_number_and_well_formed(how, seed, number, held_out):
    own = how.batch(seed, range(number, number + 3), held_out=held_out)
    alone = how.batch(seed, range(number + 1, number + 2), held_out=held_out)
    for name in ("ids", "kinds", "numbers", "classes", "labels", "keys", "knowable"):
        assert np.array_equal(getattr(own, name)[1:2], getattr(alone, name)), name
    first_label, first_word = how.vocabulary.first_label, how.vocabulary.first_word
    assert (own.ids[:, 0] == BEGIN).all()
    assert (own.ids[own.kinds == PREFIX] == COLON).all()
    assert (own.ids[own.kinds == SEPARATOR] == SEMICOLON).all()
    assert (own.ids[own.kinds == WORD] >= first_word).all()
    assert own.ids.max() < len(how.vocabulary)
    for ids, kinds, numbers, classes, labels, keys in zip(
        own.ids, own.kinds, own.numbers, own.classes, own.labels, own.keys, strict=True
    ):
        there = labels[labels >= 0]
        assert how.classes[0] <= len(there) <= how.classes[1]
        assert len(set(there)) == len(there)
        assert ((there >= first_label) & (there < first_word)).all()
        meaning: dict[int, int] = {}
        for j in range(numbers.max() + 1):
            mine = numbers == j
            text = mine & (kinds == WORD)
            if not (mine & (kinds == LABEL)).any():
                continue  # cut off
            assert how.words[0] <= text.sum() <= how.words[1]
            assert ids[mine & (kinds == LABEL)].tolist() == [labels[classes[j]]]
            assert list(kinds[mine])[: text.sum() + 2] == [WORD] * text.sum() + [PREFIX, LABEL]
            owned = keys[text] >= 0
            assert owned.any()
            assert (keys[text][owned] // how.keywords == classes[j]).all()
            for word, key in zip(ids[text], keys[text], strict=True):
                assert meaning.setdefault(int(word), int(key)) == key


def test_streams_differ():
    one = SMALL.batch(0, range(2)).ids
    assert not np.array_equal(one, SMALL.batch(0, range(2), held_out=True).ids)
    assert not np.array_equal(one, SMALL.batch(1, range(2)).ids)
    assert not np.array_equal(one[0], one[1])


def test_knowable_by_hand():
    how = Episodes(tokens=80, classes=(3, 3), words=(2, 3), keywords=2, vocabulary=SMALL.vocabulary)
    batch = how.batch(4, range(20))
    for row in range(20):
        seen: set[int] = set()
        for j in range(batch.numbers[row].max() + 1):
            own = set(batch.keys[row][batch.numbers[row] == j].tolist()) - {-1}
            assert batch.knowable[row, j] == bool(own & seen)
            seen |= own


def test_skew_and_bursts_are_as_asked():
    wide = {"tokens": 600, "classes": (4, 4), "words": (1, 1), "keywords": 1, "vocabulary": SMALL.vocabulary}
    even = Episodes(**wide).batch(0, range(50)).classes
    assert np.bincount(even.ravel()) / even.size == pytest.approx(4 * [0.25], abs=0.02)
    skewed = Episodes(**wide, skew=1.0).batch(0, range(50)).classes
    assert np.bincount(skewed.ravel()) / skewed.size == pytest.approx(np.array([12, 6, 4, 3]) / 25, abs=0.02)
    bursty = Episodes(**wide, burstiness=0.8, recent=1).batch(0, range(50)).classes
    assert (bursty[:, 1:] == bursty[:, :-1]).mean() == pytest.approx(0.8 + 0.2 / 4, abs=0.02)
    same = Episodes(**wide, burstiness=1.0, recent=3).batch(0, range(5)).classes
    assert (same == same[:, :1]).all()


def test_an_episode_as_a_prompt():
    episode = SMALL.episode(3, 5)
    prompt = episode.prompt()
    assert len(prompt.label_positions) == episode.length - 1
    tokenizer = SMALL.tokenizer()
    assert tuple(tokenizer(prompt.text)["input_ids"]) == prompt.ids
    assert tokenizer.decode(prompt.ids, skip_special_tokens=True) == prompt.text
    assert prompt.roles[-1] == "target"
    assert prompt.ids[-1] == COLON
    # In the training sequence the label of the query follows.
    assert episode.ids[prompt.target + 1] == prompt.label_ids[prompt.gold]
    for place, kind in zip(prompt.label_positions, prompt.label_classes, strict=True):
        assert prompt.ids[place] == prompt.label_ids[kind]
        assert prompt.roles[place] == "label"
    assert prompt.demonstrations[-1] == QUERY
    assert prompt.ids[prompt.query - 1] == SEMICOLON
    assert {prompt.demonstrations[p] for p in prompt.label_positions} == set(range(episode.length - 1))
    short = episode.prompt(2)
    assert len(short.label_positions) == 2
    assert short.ids == prompt.ids[: len(short.ids)]
    for wrong in (0, episode.length):
        with pytest.raises(AnchorsError, match="demonstrations"):
            episode.prompt(wrong)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"classes": (1, 3)}, "tell apart"),
        ({"classes": (5, 3)}, "not a range"),
        ({"classes": (4, 40)}, "label words"),
        ({"keywords": 30}, "more than half"),
        ({"keyword_rate": 1.5}, "probability"),
        ({"burstiness": float("nan")}, "probability"),
        ({"skew": -1.0}, "exponent"),
        ({"tokens": 10}, "does not hold"),
        ({"vocabulary": Vocabulary(8, 100_000)}, None),
    ],
)
def test_impossible_episodes_are_refused(options, message):
    if message is None:
        assert len(set(Episodes(**options).vocabulary.tokens)) == 100_013
        return
    with pytest.raises(AnchorsError, match=message):
        Episodes(**options)


def test_words_are_distinct_and_survive_the_tokenizer():
    for vocabulary in (Vocabulary(), Vocabulary(980, 4900), Vocabulary(2, 8)):
        assert len(set(vocabulary.tokens)) == len(vocabulary)
        ids = list(range(3, len(vocabulary)))
        assert vocabulary.tokenizer()(vocabulary.text(ids))["input_ids"] == [BEGIN, *ids]
    with pytest.raises(AnchorsError, match="make up"):
        Vocabulary(10_000, 10)
    tokenizer = bytes_tokenizer()
    text = "Zürich:\n\t∑ 🙂 \x00"
    ids = tokenizer(text)["input_ids"]
    assert len(ids) == 1 + len(text.encode())
    assert tokenizer.decode(ids, skip_special_tokens=True) == text
    assert len(tokenizer) == 258


def test_windows_of_a_text(tmp_path):
    path = tmp_path / "book.txt"
    path.write_text("".join(f"Line {i} of a long story.\n" for i in range(300)), encoding="utf-8")
    data = Windows.read(path, 32)
    text = path.read_text(encoding="utf-8")
    cut = text[int(len(text) * 0.95) :]
    decode = data.tokenizer().decode
    for ids in data.rows(0, range(50)).ids:
        assert decode(ids) in text[: int(len(text) * 0.95) + 1]
    assert all(decode(ids) in cut for ids in data.rows(0, range(50), held_out=True).ids)
    assert np.array_equal(data.rows(0, range(7, 9)).ids, data.rows(0, range(9)).ids[7:])
    with pytest.raises(AnchorsError, match="too few"):
        Windows.read(path, 4000)
    with pytest.raises(AnchorsError, match="cannot be read"):
        Windows.read(tmp_path / "none.txt", 32)
    path.write_bytes(b"\xff\xfe\xff")
    with pytest.raises(AnchorsError, match="UTF-8"):
        Windows.read(path, 32)
