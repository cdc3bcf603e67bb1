"""The text of a prompt: what is a mark, a LoRA, a weight, and what is left where words were taken out."""

from __future__ import annotations

import pytest
from lora_ensemble.methods.prompt_text import (
    blanked,
    joined,
    letters,
    parse_loras,
    parse_marks,
    pieces,
    unweighted,
)


def test_marks_are_in_the_order_of_the_text():
    """Not in that in which they end."""
    assert parse_marks("[1: woman with [2: a hat]]") == ("woman with a hat", ((0, 16, 1), (11, 16, 2)))


@pytest.mark.parametrize(("text", "found"), [
    ("<lora: a.safetensors :1>", ("a.safetensors", 1.0, 1.0)), ("<LoRA:a:100:-100>", ("a", 100.0, -100.0)),
    ("<lora:a:0.5>", ("a", 0.5, 0.5))])
def test_loras(text, found):
    assert parse_loras(f"x, {text}, y") == ("x, y", (found,))


@pytest.mark.parametrize("text", ["<lora-x:a:1>", "<lora x:a>", "<lora: :1>", "<lora:>"])
def test_loras_without_a_file(text):
    with pytest.raises(ValueError, match="names no file"):
        parse_loras(text)


def test_other_angle_brackets_are_text():
    assert parse_loras("<loras:x:1>, a <b>") == ("<loras:x:1>, a <b>", ())


@pytest.mark.parametrize(("text", "bare"), [
    ("(ohwx woman:.5), b", "ohwx woman, b"), ("(a:-1.), ((b:1.2):+2)", "a, b"), ("(a), (b: c)", "(a), (b: c)"),
    (f"{2000 * '('}a{2000 * ':1.1)'}", "a"),  # a file's trigger words may be anything
    ("\\(a:2)", "\\(a:2)"), ("(a:2\\)", "(a:2\\)"), ("\\(a: 2\\)", "\\(a: 2\\)")])
def test_weights_that_are_written_out(text, bare):
    assert unweighted(text) == bare


@pytest.mark.parametrize(("left", "right", "whole"), [
    ("a, ", ", b", "a, b"), ("a ", " b", "a b"), ("a, ", "", "a"), ("a, ", "  ", "a"), (", ", ",, b", ", b"),
    ("", ", , b", "b"), ("(a, ", ":1.2)", "(a:1.2)"), ("(a, ", ")", "(a)"), ("a\n", ", b", "a\nb"),
    ("(", ", b)", "(b)"), ("[", " b", "[b"), ("a ", "]", "a]"), ("a ", ". b", "a. b"), ("a ", "! b", "a! b"),
    ("a ", "(b", "a (b"), ("a, ", "\n", "a\n")])
def test_halves_of_a_text(left, right, whole):
    assert joined(left, right) == whole


@pytest.mark.parametrize(("text", "kept"), [
    ("a (b:1.2) c", "a  b      c"), ("(a:b:1.2)", " a:b     "), ("(:1.2) a", " :1.2  a"), ("(a", "(a"),
    ("a)) (b)", "a)) (b)"), ("a \\", "a \\"), ("\\(a\\)", " (a )"), ("a)b(c", "a)b(c"), ("((a))", "  a  "),
    ("(a:x)", " a:x ")])
def test_blanks_for_what_only_says_weights(text, kept):
    assert blanked(text) == kept


def test_a_text_encoder_without_weights_reads_parentheses():
    assert ["".join(letter.char for letter in segment) for segment in letters("a (b:1.2) \\(c\\)", weights=False)] == [
        "a (b:1.2) (c)"]


def test_words_and_signs():
    text = "an embedding:cat_2<x, super-embedding:cat 红色 b_c"
    assert [text[start:end] for start, end in pieces(text)] == [
        "an", "embedding:cat_2", "<", "x", ",", "super", "-", "embedding", ":", "cat", "红", "色", "b_c"]
