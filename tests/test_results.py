"""What the long runs keep: a stopped run goes on, changed code begins anew, and the page says what is missing."""

from __future__ import annotations

import json

import pytest
from lora_ensemble.tools import results
from lora_ensemble.tools.report import Part, page
from lora_ensemble.tools.results import EVERYTHING, Results, Share, TimeOver, fingerprint, options, read

CASES = ["1", "2", "3", "4"]
PART = Part("some", "some cases", 4)


def kept(folder, keep: bool = False) -> Results:
    return Results("some", ("test_results.py",), keep, folder)


def check(made: list, stop: str | None = None):
    def one(case: str):
        if case == stop:
            raise KeyboardInterrupt
        made.append(case)
        if case == "2":
            raise ValueError("too | much")
        return ("odd" if int(case) % 2 else "even"), {"size": int(case)}

    return one


def test_a_stopped_run_goes_on_and_what_failed_is_made_again(tmp_path):
    made: list[str] = []
    with pytest.raises(KeyboardInterrupt):
        kept(tmp_path).judge(CASES, check(made, "3"))
    text = page("--all", tmp_path, [PART])
    assert "2 of 4 | 1 odd; 1 failed" in text and "2 of 4 cases are missing" in text
    assert kept(tmp_path).judge(CASES, check(made)) == 1
    assert made == ["1", "2", "2", "3", "4"]
    assert [line["case"] for line in read("some", tmp_path)] == CASES
    text = page("--all", tmp_path, [PART])
    assert "4 of 4 | 2 odd, 1 even; 1 failed" in text and "are missing" not in text and "Nothing." in text
    assert "`some` 2: FAILED: ValueError at test_results.py:26: too / much" in text


def test_a_line_that_was_cut_short_is_made_again(tmp_path):
    kept(tmp_path).add("1", "odd", True, 0.1)
    with (tmp_path / "some.jsonl").open("a") as file:
        file.write('\n{"case": "3", "beca')
    made: list[str] = []
    kept(tmp_path).judge(["1", "3"], check(made))
    assert made == ["3"] and [line["case"] for line in read("some", tmp_path)] == ["1", "3"]


def test_findings_of_other_code_are_made_again_unless_they_are_kept(tmp_path, monkeypatch):
    kept(tmp_path).judge(["1"], check([]))
    (line,) = read("some", tmp_path)
    (tmp_path / "some.jsonl").write_text(json.dumps(line | {"code": "old", "commit": "abc"}) + "\n")
    made: list[str] = []
    kept(tmp_path, keep=True).judge(["1"], check(made))
    assert not made and "abc" in page("--all", tmp_path, [PART])
    kept(tmp_path).judge(["1"], check(made))
    assert made == ["1"] and "abc" not in page("--all", tmp_path, [PART])


def test_the_fingerprint_is_of_the_pack_and_of_the_files_named(tmp_path, monkeypatch):
    for name in ("kernels/a.py", "tests/run.py", "tests/other.py", "__init__.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("1")
    monkeypatch.setattr(results, "ROOT", tmp_path)

    def changes(name: str, of: str = "run.py") -> bool:
        fingerprint.cache_clear()
        before = fingerprint(of)
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
        fingerprint.cache_clear()
        return fingerprint(of) != before

    assert not changes("tests/other.py") and not changes("web/page.md")
    assert changes("kernels/a.py") and changes("tests/run.py")
    assert changes("web/other.md", EVERYTHING) and not changes("web/other.md", EVERYTHING)
    assert not changes("tests/REPORT.md", EVERYTHING) and not changes("demo/x.png", EVERYTHING)
    fingerprint.cache_clear()


def test_what_comes_after_is_held_against_the_cases_before_it(tmp_path):
    def after(cases: list[str]) -> None:
        assert cases == ["1", "3"]
        raise AssertionError("another picture")

    assert kept(tmp_path).judge(["1", "3"], check([]), after) == 1
    assert not kept(tmp_path).done("3") and "another picture" in page("--all", tmp_path, [PART])


def test_the_page_says_how_a_run_was_started(tmp_path, monkeypatch):
    monkeypatch.setattr("sys.argv", ["some.py", "--files", "6", "--keep", "--out", str(tmp_path)])
    kept(tmp_path).judge(["1"], check([]))
    assert "some cases (`some --files 6`)" in page("--all", tmp_path, [PART])
    monkeypatch.setattr("sys.argv", ["some.py", "--keep"])
    (tmp_path / "some.jsonl").unlink()
    kept(tmp_path).judge(["1"], check([]))
    assert "some cases (`some`)" in page("--all", tmp_path, [PART])


def test_the_page_names_the_machines_of_the_findings(tmp_path):
    """Not the one that it is written on."""
    kept(tmp_path).judge(["1"], check([]))
    (line,) = read("some", tmp_path)
    assert f"found on {line['machine']};" in page("--all", tmp_path, [PART])
    (tmp_path / "some.jsonl").write_text(json.dumps(line | {"machine": "a PDP-11"}))
    kept(tmp_path, keep=True).judge(["3"], check([]))
    assert f"found on a PDP-11 and {line['machine']};" in page("--all", tmp_path, [PART])


def test_what_was_not_run_is_said(tmp_path):
    assert "some cases (`some`): not run." in page("--report", tmp_path, [PART])


@pytest.mark.parametrize("each", [False, True])
def test_what_has_no_findings_is_as_on_the_page_before(tmp_path, each):
    """Guard: a page that says less than the one it replaces, since what it was made of is on another machine."""
    some, other = Part("some", "some cases", 3, each=each), Part("other", "other cases", 2)
    kept(tmp_path).judge(["1", "2"], check([]))
    (line,) = [line for line in read("some", tmp_path) if line["case"] == "1"]
    (tmp_path / "some.jsonl").write_text(json.dumps(line | {"machine": "a PDP-11"}) + "\n" + json.dumps(
        read("some", tmp_path)[1]))
    before = page("--all", tmp_path, [some, other])
    (tmp_path / "some.jsonl").rename(tmp_path / "other.jsonl")
    after = page("--page", tmp_path, [some, other], before)
    told = {text for text in before.splitlines() if text.startswith(("| some", "| 1", "| 2", "* some", "* `some`"))}
    assert len(told) >= 2 + each and told <= {*after.splitlines()}
    assert "found on a PDP-11 and " in after and "other cases (`other`): not run" not in after
    assert page("--page", tmp_path, [some, other], after) == after
    assert "some cases (`some`): not run." in page("--page", tmp_path, [some, other])


def shared(folder, text: str) -> Results:
    chosen = options(None).parse_args(["--out", str(folder), "--share", text])
    return Results.asked("some", ("test_results.py",), chosen)


@pytest.mark.parametrize("whole", [1, 2, 3, 7])
def test_shares_are_all_cases_and_each_once(whole):
    cases = [f"{kind} {k}" for k in range(3) for kind in "abcd"]
    for together in (lambda case: case, lambda case: case[0]):
        shares = [Share(which, whole).of(cases, together) for which in range(1, whole + 1)]
        assert sorted(sum(shares, [])) == sorted(cases)
    kinds = [{case[0] for case in share} for share in shares]
    assert sum(map(len, kinds)) == 4, "what belongs together is in one share"
    assert all(share == [case for case in cases if case in share] for share in shares), "in their order"


@pytest.mark.parametrize("text", ["0/3", "4/3", "1", "a/b", "1/2/3"])
def test_what_is_no_share_is_refused(tmp_path, text, capsys):
    with pytest.raises(SystemExit):
        shared(tmp_path, text)
    assert "--share" in capsys.readouterr().err


def test_processes_with_a_share_each_make_one_whole(tmp_path):
    """Each writes a file of its own; a later run of the whole has nothing to do, and the page joins them."""
    made: list[str] = []
    assert shared(tmp_path, "1/2").judge(CASES, check(made)) == 0 and made == ["1", "3"]
    text = page("--all", tmp_path, [PART])
    assert "2 of 4 | 2 odd; 0 failed" in text and "2 of 4 cases are missing" in text
    assert shared(tmp_path, "2/2").judge(CASES, check(made)) == 1 and made == ["1", "3", "2", "4"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["some.1-of-2.jsonl", "some.2-of-2.jsonl"]
    assert {line["case"]: line["of"] for line in read("some", tmp_path)} == dict.fromkeys(CASES, 4)
    assert ", in 2 shares) | 4 of 4 | 2 odd, 1 even; 1 failed" in page("--all", tmp_path, [PART])
    assert kept(tmp_path).judge(CASES, lambda case: ("mended", {})) == 0
    assert [line["became"] for line in sorted(read("some", tmp_path), key=lambda line: line["case"])] == [
        "odd", "mended", "odd", "even"], "the last finding counts, whichever file it is in"


def test_the_last_finding_counts_in_whatever_file_it_is(tmp_path):
    for name, became, day in (("some", "new", 2), ("some.1-of-2", "old", 1)):
        line = {"case": "1", "ok": True, "code": "x", "became": became, "when": f"2026-01-0{day}T00:00:00+00:00"}
        (tmp_path / f"{name}.jsonl").write_text(json.dumps(line))
    assert [line["became"] for line in read("some", tmp_path)] == ["new"]


def test_no_case_is_begun_when_the_time_is_over(tmp_path):
    made: list[str] = []
    over = Results.asked("some", (), options(None).parse_args(["--out", str(tmp_path), "--minutes", "0"]))
    assert over.judge(CASES, check(made)) == 1 and not made
    enough = Results.asked("some", (), options(None).parse_args(["--out", str(tmp_path), "--minutes", "60"]))
    assert 3500 < enough.left() < 3600

    def cut(case: str):
        if case == "3":
            raise TimeOver
        return "whole", {}

    assert enough.judge(CASES, cut) == 1
    assert [line["case"] for line in read("some", tmp_path)] == ["1", "2"], "what was cut has no finding"


def test_a_copy_without_its_own_history_is_told_its_commit(monkeypatch):
    monkeypatch.setenv("LORA_ENSEMBLE_COMMIT", "abc1234")
    results.commit.cache_clear()
    try:
        assert results.commit() == "abc1234"
    finally:
        results.commit.cache_clear()
