"""Whose words are whose: twenty prompts of tags and twenty of sentences, with answers written by hand."""

from __future__ import annotations

from random import Random

import pytest
from lora_ensemble.methods import prompt_text
from lora_ensemble.methods.prompt import LoRAWords, PromptTokens, find_clauses, stand_in, words_of
from lora_ensemble.methods.prompt_text import letters, parse_loras, parse_marks, without

A, B, S = "ohwx", "sks", "ghibli style"

# (prompt, words of the LoRAs, clauses of each LoRA, clauses of none)
TAGS = [
    ("ohwx woman, long red hair, sks dog, masterpiece", (A, B), [["ohwx woman"], ["sks dog"]],
     ["long red hair", "masterpiece"]),
    ("ohwx woman, (long red hair:1.2), sks dog", (A, B), [["ohwx woman"], ["sks dog"]], ["long red hair"]),
    ("(ohwx woman:1.3), ((sks)) dog", (A, B), [["ohwx woman"], ["sks dog"]], []),
    ("1girl, ohwx, red hair, ohwx, sks", (A, B), [["ohwx", "ohwx"], ["sks"]], ["1girl", "red hair"]),
    ("OHWX Woman, smiling", (A,), [["OHWX Woman"]], ["smiling"]),
    ("ohwx_woman, sks_dog", ("ohwx woman", "sks dog"), [["ohwx_woman"], ["sks_dog"]], []),
    ("ohwx_woman, the_sks_dog", (A, B), [["ohwx_woman"], ["the_sks_dog"]], []),
    ("masterpiece, best quality, ohwx woman BREAK sks dog, park", (A, B), [["ohwx woman"], ["sks dog"]],
     ["masterpiece", "best quality", "park"]),
    ("ohwx woman,sks dog,ghibli style", (A, B, S), [["ohwx woman"], ["sks dog"], ["ghibli style"]], []),
    ("ohwx woman\nsks dog\nin the rain", (A, B), [["ohwx woman"], ["sks dog"]], ["the rain"]),
    ("ohwx \\(series\\), sks dog", (A, B), [["ohwx (series)"], ["sks dog"]], []),
    ("ganyu \\(genshin impact\\), sks dog", ("ganyu (genshin impact)", B),
     [["ganyu (genshin impact)"], ["sks dog"]], []),
    ("ganyu_\\(genshin_impact\\) smiling, sks", ("ganyu \\(genshin impact\\)", B),
     [["ganyu_(genshin_impact) smiling"], ["sks"]], []),
    ("(ganyu (genshin impact):1.2), ganyu", ("ganyu_(genshin_impact)", B), [["ganyu genshin impact"], []], ["ganyu"]),
    ("sks (dog), ohwx \\(dog\\), dog", ("sks dog", "ohwx (dog)"), [["sks dog"], ["ohwx (dog)"]], ["dog"]),
    ("embedding:easynegative, ohwx woman", (A,), [["ohwx woman"]], ["embedding:easynegative"]),
    ("ohwx, red dress", ("ohwx, red dress",), [["ohwx", "red dress"]], []),
    ("a photo of ohwx woman, blue eyes, sks", (A, B), [["a photo of ohwx woman"], ["sks"]], ["blue eyes"]),
    ("ohwx woman | sks dog; night", (A, B), [["ohwx woman"], ["sks dog"]], ["night"]),
    ("[ohwx woman], [sks dog]", (A, B), [["[ohwx woman]"], ["[sks dog]"]], []),
    ("woman, dog", (A, B), [[], []], ["woman", "dog"]),
    ("ohwxy woman, presks dog", (A, B), [[], []], ["ohwxy woman", "presks dog"]),
    ("[1: woman, red hair], [2: dog]", (A, B), [["woman, red hair"], ["dog"]], []),
    ("[2: ohwx woman], sks dog", (A, B), [[], ["ohwx woman"]], ["sks dog"]),
    ("sks dog, red hair, ohwx woman, red hair", ("ohwx, red hair", B), [["red hair", "ohwx woman", "red hair"],
                                                                        ["sks dog"]], []),
]
SENTENCES = [
    ("ohwx woman with long red hair beside a sks dog, in ghibli style", (A, B, S),
     [["ohwx woman with long red hair"], ["a sks dog"], ["ghibli style"]], []),
    ("a photo of ohwx woman and a big sks dog", (A, B), [["a photo of ohwx woman"], ["a big sks dog"]], []),
    ("ohwx woman holding a sks cup.", (A, B), [["ohwx woman holding"], ["a sks cup"]], []),
    ("An ohwx woman sits on a chair. A sks dog sleeps under the table.", (A, B),
     [["An ohwx woman sits"], ["A sks dog sleeps"]], ["a chair", "the table"]),
    ("ohwx woman sks dog", (A, B), [["ohwx woman"], ["sks dog"]], []),
    ("ohwx woman big brown sks dog", (A, B), [["ohwx woman big"], ["brown sks dog"]], []),
    ("ohwx woman with red hair and blue eyes in front of the sks house", (A, B),
     [["ohwx woman with red hair and blue eyes"], ["the sks house"]], []),
    ("a sks dog to the left of ohwx woman", (A, B), [["ohwx woman"], ["a sks dog"]], []),
    ("ohwx woman next to ohwx woman near the sea", (A,), [["ohwx woman", "ohwx woman"]], ["the sea"]),
    ("ohwx woman and ohwx man talk in a cafe", (A,), [["ohwx woman and ohwx man talk"]], ["a cafe"]),
    ("The cat in the hat sleeps behind a sks dog", ("cat in the hat", B), [["The cat in the hat sleeps"],
                                                                         ["a sks dog"]], []),
    ("a painting by ohwx of a sks dog", (A, B), [["ohwx"], ["a sks dog"]], ["a painting"]),
    ("ohwx woman wearing her sks dress at night", (A, B), [["ohwx woman wearing"], ["her sks dress"]], ["night"]),
    ("A (large ohwx woman:1.2) walks with a sks dog through the city", (A, B),
     [["A large ohwx woman walks"], ["a sks dog"]], ["the city"]),
    ("[1: the woman with red hair] walks beside [2: her dog] in the park", (A, B),
     [["the woman with red hair"], ["her dog"]], ["walks", "the park"]),
    ("[1: a woman] and the sks dog she loves", (A, B), [["a woman"], ["the sks dog she loves"]], []),
    ("ohwx woman, and the sks dog!", (A, B), [["ohwx woman"], ["the sks dog"]], []),
    ("Scene: ohwx woman — sks dog — sunset", (A, B), [["ohwx woman"], ["sks dog"]], ["Scene", "sunset"]),
    ("her hair is version 1.5 of ohwx hair, in the background mountains", (A,),
     [["her hair is version 1.5 of ohwx hair"]], ["mountains"]),
    ("<|im_start|>user\nohwx woman in the rain<|im_end|>", (A,), [["ohwx woman"]], ["user", "the rain"]),
]


def prompt_of(text: str) -> PromptTokens:
    """A token for each word and sign."""
    clean, rows = parse_marks(text)
    return PromptTokens(clean, 99, tuple((start, end, (at,)) for at, (start, end) in enumerate(words_of(clean))), rows)


def loras_of(words: tuple[str, ...]) -> list[LoRAWords]:
    return [LoRAWords(f"lora {at + 1}", typed) for at, typed in enumerate(words)]


@pytest.mark.parametrize(("text", "words", "own", "others"), TAGS + SENTENCES, ids=lambda value: str(value)[:40])
def test_clauses(text, words, own, others):
    prompt = prompt_of(text)
    found = find_clauses(prompt, loras_of(words))
    assert [[clause.text for clause in lora.clauses] for lora in found.loras] == own
    assert [clause.text for clause in found.others] == others
    for lora in found.loras:
        assert bool(lora.clauses) == bool(lora.source) != bool(lora.reason)
    tokens = [token for lora in found.loras for token in lora.tokens] + [
        token for clause in found.others for token in clause.tokens]
    assert len(tokens) == len(set(tokens))
    for clause in [clause for lora in found.loras for clause in lora.clauses]:
        assert clause.tokens == prompt.tokens(clause.start, clause.end) != ()


@pytest.mark.parametrize(("text", "typed", "clause"), [
    ("一个ohwx女人，蓝色的狗", "ohwx", "一个ohwx女人"), ("赤い髪のohwxの女性、青い犬", "ohwx", "赤い髪のohwxの女性"),
    ("ohwx를 입은 여자, 개", "ohwx", "ohwx를 입은 여자"), ("ผู้หญิงohwxสวย, หมา", "ohwx", "ผู้หญิงohwxสวย"),
    ("a cafe\u0301 woman, dog", "caf\u00e9 woman", "a cafe\u0301 woman"),
    ("a caf\u00e9 woman, dog", "cafe\u0301 woman", "a caf\u00e9 woman"),
])
def test_a_trigger_is_found_beside_scripts_without_spaces_and_however_accents_are_written(text, typed, clause):
    found = find_clauses(prompt_of(text), loras_of((typed,)))
    assert [own.text for own in found.loras[0].clauses] == [clause] and len(found.others) == 1


@pytest.mark.parametrize(("text", "typed"), [("ohwxes, xohwx, ohwx1", "ohwx"), ("a cafe\u0301", "cafe")])
def test_a_trigger_is_no_part_of_a_longer_word(text, typed):
    assert not find_clauses(prompt_of(text), loras_of((typed,))).loras[0].clauses


def test_tokens_of_a_range_are_those_of_the_words_that_it_touches():
    random, words, at = Random(4), [], 0
    for k in range(40):
        start = at + random.randrange(3)
        at = start + random.randint(1, 4)
        words.append((start, at, tuple(random.sample(range(50), k % 4))))
    prompt = PromptTokens("x" * at, 50, tuple(words))
    for start in range(at + 2):
        for end in range(start, at + 2):
            touched = {token for first, last, own in words if first < end and last > start for token in own}
            assert prompt.tokens(start, end) == tuple(sorted(touched))


def test_marks_beat_typed_words_and_those_beat_the_files():
    prompt = prompt_of("[1: a woman], ohwx person, trg dog")
    lora = LoRAWords("x", "ohwx", ("trg",))
    assert [clause.text for clause in find_clauses(prompt, [lora]).loras[0].clauses] == ["a woman"]
    found = find_clauses(prompt_of("a woman, ohwx person, trg dog"), [lora]).loras[0]
    assert (found.source, found.clauses[0].text) == ("typed", "ohwx person")
    found = find_clauses(prompt_of("a woman, trg dog"), [lora]).loras[0]
    assert (found.source, found.clauses[0].text) == ("trigger", "trg dog")


def test_the_reason_says_what_is_missing():
    prompt = prompt_of("a woman, a dog")
    typed, trigger, nothing = find_clauses(prompt, [LoRAWords("x", "ohwx"), LoRAWords("y", "", ("trg",)),
                                                    LoRAWords("z")]).loras
    assert typed.reason == 'its words "ohwx" are not in the prompt'
    assert "trigger words of its file" in trigger.reason and "trg" in trigger.reason
    assert "no words were typed" in nothing.reason
    same = find_clauses(prompt, [LoRAWords("x", "woman"), LoRAWords("y", "woman")]).loras[1]
    assert "belong to x" in same.reason
    cut = PromptTokens("a woman, a dog", 4, tuple((start, end, ()) for start, end in words_of("a woman, a dog")))
    assert "does not read as far" in find_clauses(cut, [LoRAWords("x", "dog")]).loras[0].reason
    lost = PromptTokens("a dog", 4, reason="it was lost")
    assert find_clauses(lost, [LoRAWords("x", "dog")]).loras[0].reason == "it was lost"


@pytest.mark.parametrize("words", ["(ohwx woman:1.20)", "(red hair, ohwx woman:0.8)", "((ohwx woman:1.1):1.2),, x"])
@pytest.mark.parametrize("text", ["ohwx woman, dog", "(ohwx woman:1.20), dog", "(red, ohwx woman:0.8), dog"])
def test_words_may_come_with_weights(text, words):
    """As Lora-Manager's toggle of trigger words hands them on, to the prompt and to the words of the LoRA."""
    for lora in (LoRAWords("x", words), LoRAWords("x", "", (words,))):
        assert [clause.text for clause in find_clauses(prompt_of(text), [lora]).loras[0].clauses] == ["ohwx woman"]


def test_parentheses_of_a_tag_are_no_weight():
    for typed in ("ganyu (genshin impact)", r"ganyu \(genshin impact\)", r"ganyu \(genshin: 2\)"):
        assert LoRAWords("x", typed).phrases == ((typed, ""),)


def test_a_mark_for_a_row_that_there_is_not_is_told():
    found = find_clauses(prompt_of("[3: a woman]"), loras_of((A, B)))
    assert "names row 3, and the ensemble has 2" in found.notes[0]


def test_two_marks_may_share_words():
    found = find_clauses(prompt_of("[1: woman with [2: a hat]]"), loras_of((A, B)))
    assert [lora.clauses[0].text for lora in found.loras] == ["woman with a hat", "a hat"]
    assert set(found.loras[1].tokens) < set(found.loras[0].tokens)


@pytest.mark.parametrize(("text", "clean", "rows"), [
    ("a woman", "a woman", ()),
    ("[1: a woman] here", "a woman here", ((0, 7, 1),)),
    ("x [12:a [red] dog ]", "x a [red] dog", ((2, 13, 12),)),
    ("[cat:dog:0.5] [2]", "[cat:dog:0.5] [2]", ()),
    ("([2: a dog]:1.2)", "(a dog:1.2)", ((1, 6, 2),)),
    ("a ] b [", "a ] b [", ()),
])
def test_marks(text, clean, rows):
    assert parse_marks(text) == (clean, rows)


@pytest.mark.parametrize("text", [
    "[00:05] a man speaks", "[00:00 - 00:05]: rain", "[01:05] thunder", "[0:05 - 0:10] a door", "[12:30] noon",
    "[1:02:03] credits", "a film in [16:9]", "[1:1], [4 : 3], [2.39:1]", "[00:05 a man speaks]",
])
def test_times_and_ratios_are_no_marks(text):
    """As in the script of a film, with the CLIP of a method node behind an ordinary CLIP Text Encode."""
    assert parse_marks(text) == (text, ())


def test_a_mark_may_begin_with_a_number():
    assert parse_marks("[1:2girls], [2: 3 cats], [3:10cm doll]") == (
        "2girls, 3 cats, 10cm doll", ((0, 6, 1), (8, 14, 2), (16, 25, 3)))


@pytest.mark.parametrize(("text", "message"), [
    ("x [2: a dog", "'[2: a dog' in the prompt is not closed"),
    ("[2: a [dog]", "not closed"),
    ("[1: ] dog", "'[1: ]' in the prompt is empty"),
    ("[0: dog]", "row 0"),
])
def test_malformed_marks_are_named(text, message):
    with pytest.raises(ValueError) as error:
        parse_marks(text)
    assert message in str(error.value)


@pytest.mark.parametrize(("text", "clean", "loras"), [
    ("a woman", "a woman", ()),
    ("a, <lora:styles/foo:0.8>, b", "a, b", (("styles/foo", 0.8, 0.8),)),
    ("<lora:x:1:0.5> a <LORA:y>", "a", (("x", 1.0, 0.5), ("y", 1.0, 1.0))),
    ("a<lora:x:-0.5>\nb", "a\nb", (("x", -0.5, -0.5),)),
    ("<lora:x>", "", (("x", 1.0, 1.0),)),
])
def test_loras_in_the_text(text, clean, loras):
    assert parse_loras(text) == (clean, loras)


@pytest.mark.parametrize(("text", "message"), [
    ("a <lora:x:0.8", "has no '>'"),
    ("<lora:>", "names no file"),
    ("<lora>", "names no file"),
    ("<lora:x:strong>", "has 'strong' where a number belongs"),
    ("<lora:x:nan>", "has 'nan' for a strength"), ("<lora:x:1:-1e9>", "which goes from -100 to 100"),
    ("<lora:x:1:1:lbw=0>", "more than two numbers"),
])
def test_malformed_loras_are_named(text, message):
    with pytest.raises(ValueError) as error:
        parse_loras(text)
    assert message in str(error.value) and repr(text[text.index("<"):])[1:-1] in str(error.value)


@pytest.mark.parametrize(("text", "typed", "rest"), [
    ("ohwx woman, red hair", "ohwx", "red hair"),
    ("night, ohwx woman, red hair", "ohwx", "night, red hair"),
    ("night, (ohwx woman:1.2)", "ohwx", "night"),
    ("night, ((ohwx woman:1.2)), red", "ohwx", "night, red"),
    ("night, (ohwx woman, red:1.2)", "ohwx", "night, (red:1.2)"),
    ("night, (red, ohwx woman:1.2)", "ohwx", "night, (red:1.2)"),
    ("a dog beside ohwx woman.", "ohwx", "a dog beside."),
])
def test_a_prompt_without_a_clause(text, typed, rest):
    clause = find_clauses(prompt_of(text), [LoRAWords("x", typed)]).loras[0].clauses[0]
    assert without(text, clause.start, clause.end) == rest


@pytest.mark.parametrize(("text", "typed", "instead", "rows"), [
    ("ohwx beside a dog", "ohwx = woman with red hair", "woman with red hair beside a dog", ((0, 19, 1),)),
    ("(ohwx:1.2) smiles, ohwx", "ohwx=tall man", "(tall man:1.2) smiles, tall man", ((1, 21, 1), (23, 31, 1))),
    ("big ohwx (woman:1.2) here", "ohwx woman = girl", "big (girl:1.2) here", ((0, 19, 1),)),
])
def test_stand_ins(text, typed, instead, rows):
    assert stand_in(prompt_of(text), [LoRAWords("x", typed)]) == (instead, rows)
    found = find_clauses(prompt_of(text), [LoRAWords("x", typed)])
    assert found.loras[0].source == "typed"


def test_no_stand_ins_no_other_text():
    assert stand_in(prompt_of("ohwx woman"), [LoRAWords("x", "ohwx")]) is None
    assert stand_in(prompt_of("a woman"), [LoRAWords("x", "ohwx = girl")]) is None


CAT, DOG = LoRAWords("x", "", ("ohwx",), "cat red fur"), LoRAWords("y", "", ("sks, sks_x",), "dog")


@pytest.mark.parametrize(("text", "loras", "instead"), [
    ("ohwx, a field", [CAT], "cat red fur, a field"),
    ("a ohwx left, (sks:1.2) right", [CAT, DOG], "a cat red fur left, (dog:1.2) right"),
    ("[1: ohwx] beside the sks dog", [CAT, DOG], "cat red fur beside the sks dog"),  # the other clause says more
    ("ohwx, ohwx with a hat", [CAT], None),
    ("ohwx beside sks", [CAT, LoRAWords("y", "", ("sks",), "Cat red fur")], None),  # could not be told apart
    ("ohwx woman", [LoRAWords("x", "", ("ohwx woman",), "1girl")], None),  # says something by itself
    ("ohwx", [LoRAWords("x", "ohwx", (), "cat")], None),  # nothing says that it means nothing
    ("ohwx", [LoRAWords("x", "ohwx = tiger", ("ohwx",), "cat")], "tiger"),
    ("ohwx", [LoRAWords("x", "", ("ohwx",))], None),
])
def test_usual_words_stand_in_for_a_trigger_that_stands_alone(text, loras, instead):
    found = stand_in(prompt_of(text), loras)
    assert (found and found[0]) == instead
    assert any(lora.instead for lora in find_clauses(prompt_of(text), loras).loras) == (instead is not None)


def test_letters_are_what_is_encoded():
    text = "a (b:1.2) \\(c\\) ((d)) (e:x) f) (g"
    segments = ["".join(letter.char for letter in segment) for segment in letters(text)]
    assert "".join(segments) == "a b (c) d e:x f) (g"
    for segment in letters(text):
        for letter in segment:
            assert text[letter.at] == letter.char


def test_a_long_prompt_is_read_once_and_not_for_each_of_its_clauses(monkeypatch):
    """Guards: a prompt of 300 clauses took half a minute, one of 1000 took minutes."""
    read: list[str] = []
    monkeypatch.setattr(prompt_text, "letters", lambda text: read.append(text) or letters(text))
    text = ", ".join(["ohwx woman", "sks dog", *(f"(thing:1.2) {i}" for i in range(60))])
    words = tuple((start, end, (k,)) for k, (start, end) in enumerate(words_of(text)))
    found = find_clauses(PromptTokens(text, len(words), words), [LoRAWords("a", A), LoRAWords("b", B)])
    assert len(found.others) == 60 and read == [text]


def test_parentheses_that_are_words_leave_with_them():
    """A backslash says that a parenthesis is no weight, so it goes where that goes."""
    text = "a ganyu \\(genshin impact\\) smiling, dog"
    assert without(text, 0, text.index(", dog")) == "dog"
    ganyu = LoRAWords("x", "ganyu (genshin impact) = blue-haired girl")
    assert stand_in(prompt_of(text), [ganyu])[0] == "a blue-haired girl smiling, dog"


def test_a_phrase_of_signs_alone_is_those_signs():
    assert [lora.tokens for lora in find_clauses(prompt_of("a: cat, dog"), [LoRAWords("x", ":)")]).loras] == [()]


PARTS = ("(", ")", "\\(", ":", ":1.2)", "[", "]", "[1: ", "[2:", " ", "\n", ", ", ". ", "ohwx", "sks", "dog", " and ",
         " a ", " in ", " next to ", "BREAK", "<lora:x:1>", "犬", "embedding:x", "= ", " with ")


def test_no_text_is_too_strange():
    """Marks are well-formed or refused; clauses are within the text, and tokens are one LoRA's."""
    random = Random(1)
    loras = [LoRAWords("one", "ohwx = a red cat, a dog"), LoRAWords("two", "sks"),
             LoRAWords("three", "", ("dog, sks",))]
    for _ in range(5000):
        text = "".join(random.choice(PARTS) for _ in range(random.randint(1, 16)))
        try:
            prompt = prompt_of(text)
        except ValueError:
            continue
        found = find_clauses(prompt, loras)
        owners = [token for lora in found.loras if lora.source != "marked" for token in lora.tokens]
        assert len(owners) == len(set(owners))
        for clause in [clause for lora in found.loras for clause in lora.clauses] + list(found.others):
            assert 0 <= clause.start < clause.end <= len(prompt.text) and clause.text, text
            rest = without(prompt.text, clause.start, clause.end)
            assert rest != prompt.text, (text, clause)
        instead = stand_in(prompt, loras)
        if instead:
            for start, end, row in instead[1]:
                assert 0 <= start < end <= len(instead[0]) and 1 <= row <= 3, (text, instead)
