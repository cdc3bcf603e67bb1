"""Charts pixel by pixel, what they say, and whether every eye can read them."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest
from lora_ensemble.host.look.chart import (
    Bar,
    Bars,
    HeatRows,
    Lines,
    Series,
    Stack,
    marks,
    parts,
    step_marks,
)
from lora_ensemble.host.look.heat import RAMP
from lora_ensemble.host.look.letters import fitted, font, has_letters, labels, measure, wrapped
from lora_ensemble.host.look.sheet import (
    MARGIN,
    WIDTH,
    Beside,
    Cell,
    Figures,
    Legend,
    Pictures,
    Text,
    as_image,
    sheet,
)
from lora_ensemble.host.look.theme import DARK, LIGHT, THEMES, brightness, contrasting, mixed, rgb
from PIL import Image

themes = pytest.mark.parametrize("theme", THEMES.values(), ids=THEMES)
LONG = "a name that is far too long for any place in a chart " * 4
NAMES = ("alice", "ink", "coat", LONG)
VALUES = ([1.0, 0.5, 0.0, 0.25], [0.0, 0.5, 0.0, 0.25], [0.0, 0.0, 1.0, 0.25], [0.0, 0.0, 0.0, 0.25])
LAYERS = [Series(name, values) for name, values in zip(NAMES, VALUES, strict=True)]
RAND = np.random.default_rng(5)
NOISE = Image.fromarray(RAND.integers(0, 255, (30, 50, 3), dtype=np.uint8))
BLOCKS = {
    "text": Text("word " * 90 + "\n" + LONG + "\n" + "x" * 400, "Head " + LONG),
    "figures": Figures([("20", "steps"), ("1 234 567 890 123 456 789", LONG), ("3 s", "time")]),
    "legend": Legend([(name, "#E69F00") for name in NAMES * 3]),
    "pictures": Pictures([Cell(name, NOISE, ["a line", LONG]) for name in NAMES], 3, LONG, ("no", "yes")),
    "tall pictures": Pictures([Cell("t", Image.new("RGB", (20, 60)))], 2),
    "stack": Stack("Head", LAYERS),
    "stack of nothing": Stack("Head", []),
    "long stack": Stack(LONG, [Series("a", [1.0] * 1000)], tall=60),
    "costs": Stack("Cost", [Series("a", [3, 4]), Series("b", [1, 0])], highest=None, marks=None),
    "lines": Lines("Head", LAYERS, behind=Series("grey", [0.2, 2, -1, 1])),
    "lines of one": Lines(LONG, [Series("a", [0.3]), Series("b", [None])], lowest=None),
    "progress": Lines("Head", LAYERS, ends=True, across=("progress", ((0, "0 %"), (1, "100 %"))),
                      bands=[[(0.1, 0.9)] * 4]),
    "bars": Bars(LONG, [Bar(name, value, LONG[:80 * k]) for k, (name, value) in enumerate(zip(NAMES, (1, 0, 5, 2),
                                                                                                   strict=True))]),
    "no bars": Bars("Head", []),
    "heat": HeatRows("Ages", [Series(name, [0, None, 3, 1]) for name in NAMES], ends=("whole", "old")),
    "beside": Beside((Bars("a", [Bar("x", 1, "y")]), Stack("b", LAYERS), Text(LONG))),
}
every_block = pytest.mark.parametrize("block", BLOCKS.values(), ids=BLOCKS)


def drawn(block, theme=LIGHT, width: int = 968) -> np.ndarray:
    """A block's own pixels."""
    on = Image.new("RGB", (width, block.height(width)), theme.paper)
    block.draw(on, theme, (0, 0), width)
    return np.asarray(on).astype(int)


def where(picture: np.ndarray, colour: str) -> np.ndarray:
    return (picture == rgb(colour)).all(axis=-1)


# --- every block ---


@themes
@every_block
@pytest.mark.parametrize("width", [968, 472])
def test_a_block_stays_in_its_place(block, theme, width):
    """It draws something, and nothing beside the place that it asked for (an axis may write 20 pixels over)."""
    height = block.height(width)
    on = Image.new("RGB", (width + 200, height + 200), theme.paper)
    block.draw(on, theme, (100, 100), width)
    touched = (np.asarray(on) != rgb(theme.paper)).any(axis=-1)
    rows, columns = np.flatnonzero(touched.any(axis=1)), np.flatnonzero(touched.any(axis=0))
    assert touched.any()
    assert rows[0] >= 100 and rows[-1] < 100 + height and columns[0] >= 80 and columns[-1] < 120 + width


def test_a_sheet_is_its_blocks_with_a_border():
    picture = sheet(BLOCKS.values(), LONG, LONG, DARK)
    pixels = np.asarray(picture).astype(int)
    assert picture.width == WIDTH
    paper = where(pixels, DARK.paper)
    assert paper[:, :MARGIN - 21].all() and paper[:, 21 - MARGIN:].all() and paper[:MARGIN].all()
    assert paper[-MARGIN:].all() and not paper[-MARGIN - 4:].all()
    image = as_image(picture)
    assert image.shape == (1, picture.height, WIDTH, 3) and image.min() >= 0 and image.max() <= 1


# --- charts say what is so ---


@themes
def test_the_layers_of_a_stack_are_as_high_as_their_values(theme):
    picture = drawn(Stack("", [Series("", one.values) for one in LAYERS], tall=200), theme)
    left = Stack.LEFT
    for step in range(4):
        column = picture[:, left + round((968 - left) * (step + 0.5) / 4)]
        for i, values in enumerate(VALUES):
            high = (column == rgb(theme.colour(i))).all(axis=-1).sum()
            assert high == pytest.approx(200 * values[step], abs=2), (step, i)


def test_the_first_layer_lies_below():
    picture = drawn(Stack("", [Series("", [0.5]), Series("", [0.5])], tall=200))
    first, second = (np.flatnonzero(where(picture, LIGHT.colour(i))[:, 500]) for i in (0, 1))
    assert first.min() > second.max()


def test_a_line_parts_a_layer_from_the_one_below():
    """In the layer's own lowest row: not below the lowest layer, and not in one that is hardly higher than the line."""
    layers = [Series("", [share]) for share in (0.5, 0.49, 0.01)]
    picture = drawn(Stack("", layers, tall=200))
    assert [where(picture, LIGHT.colour(i))[:, 500].sum() for i in range(3)] == [100, 97, 2]


def test_figures_are_their_numbers_and_what_they_are():
    """Each of the two changes the picture, in rows of its own."""
    base, number, what = (drawn(Figures([each])) for each in (("20", "steps"), ("21", "steps"), ("20", "stops")))
    rows = [np.flatnonzero((base != other).any(axis=(1, 2))) for other in (number, what)]
    assert len(rows[0]) and len(rows[1]) and rows[0].max() < rows[1].min()


def test_a_name_stands_in_the_widest_place_of_its_layer():
    """In letters that contrast with it, and only where it fits."""
    layers = [Series("alice", [1, 1, 0, 0]), Series("b" * 200, [0, 0, 1, 1])]
    plain = drawn(Stack("", [one._replace(name="") for one in layers]))
    named = drawn(Stack("", layers))[-len(plain):]
    box = np.argwhere((plain != named).any(axis=-1) & (where(plain, LIGHT.colour(0)) | where(plain, LIGHT.colour(1))))
    assert len(box) and (box[:, 1] > 150).all() and (box[:, 1] < 500).all()
    long = drawn(Stack("", layers[:1]))
    assert (long != drawn(Stack("", [layers[0]._replace(name="")]))[-1]).any()


def test_a_curve_goes_through_its_points():
    chart = Lines("", [Series("", [0.1, 0.9, 0.5, None, 0.25])], tall=201, highest=1.0)
    picture = drawn(chart)
    top = next(y for y in range(len(picture)) if tuple(picture[y, 700]) == rgb(LIGHT.panel))
    for step, value in enumerate((0.1, 0.9, 0.5, None, 0.25)):
        x = Lines.LEFT + round((968 - Lines.LEFT) * (step + 0.5) / 5)
        rows = np.flatnonzero(where(picture, LIGHT.colour(0))[:, x])
        if value is None:
            assert not len(rows)
        else:
            assert rows.mean() == pytest.approx(top + 200 * (1 - value), abs=4), step


def test_bars_are_as_long_as_their_values():
    picture = drawn(Bars("", [Bar("a", 1.0, "t"), Bar("b", 0.25, "t"), Bar("c", 0.0, "t")]))
    long = [where(picture, LIGHT.colour(i)).any(axis=0).sum() for i in range(3)]
    panel = where(picture, LIGHT.panel)[-13].sum()  # the row of the last bar
    assert long[0] == pytest.approx(panel, abs=3) and long[1] == pytest.approx(panel / 4, abs=3) and long[2] == 0


def test_heat_goes_from_the_lowest_to_the_highest():
    picture = drawn(HeatRows("", [Series("a", [0, 5, None, 10])], highest=10))
    row, left = picture[34 + 12], 30
    cells = [tuple(row[left + round((968 - left) * (i + 0.5) / 4)]) for i in range(4)]
    assert cells[0] == RAMP[0] and cells[3] == RAMP[-1] and cells[2] == rgb(LIGHT.panel)
    assert cells[1] not in (cells[0], cells[3])


@pytest.mark.parametrize(("low", "high"), [(0, 1), (0, 4), (0, 132), (0.9, 0.9912), (-3, 5), (0, 1e-5), (0, 3e7)])
def test_a_scale_has_round_numbers(low, high):
    found = marks(low, high)
    assert 3 <= len(found) <= 7 and all(low - 1e-9 <= value <= high * (1 + 1e-9) for value, _ in found)
    assert all(float(text) == pytest.approx(value, rel=1e-6, abs=1e-12) for value, text in found)


@pytest.mark.parametrize("count", [0, 1, 4, 16, 17, 20, 50, 77, 1000, 10000])
def test_steps_are_numbered_from_1(count):
    found = step_marks(count)
    assert len(found) <= 18 and [text for _, text in found][:1] == ["1"] * (count > 0)
    assert all(place == pytest.approx((int(text) - 0.5) / count) for place, text in found)


def test_curves_have_gaps_where_nothing_is_known():
    assert parts([None, 1, 2, None, None, 3]) == [[1, 2], [3]] and parts([]) == []


# --- for every eye ---

# Machado, Oliveira and Fernandes 2009, severity 1, on linear RGB.
BLIND = {"protanopia": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216],
                        [-0.003882, -0.048116, 1.051998]],
         "deuteranopia": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413],
                          [-0.011820, 0.042940, 0.968881]],
         "tritanopia": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602],
                        [0.004733, 0.691367, 0.303900]],
         "no colours at all": [[0.2126, 0.7152, 0.0722]] * 3, "all colours": np.eye(3)}


def lab(colour: str, eye: str) -> np.ndarray:
    """CIELAB of what an eye sees of a colour."""
    c = np.array(rgb(colour)) / 255
    linear = np.where(c <= 0.04045, c / 12.92, ((c + 0.055) / 1.055) ** 2.4)
    seen = (np.array(BLIND[eye]) @ linear).clip(0, 1)
    xyz = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]]) @ seen
    f = np.cbrt(np.maximum(xyz / (0.9505, 1, 1.089), 1e-6))
    return np.array([116 * f[1] - 16, 500 * (f[0] - f[1]), 200 * (f[1] - f[2])])


@themes
@pytest.mark.parametrize("eye", [eye for eye in BLIND if eye != "no colours at all"])
def test_every_eye_tells_the_loras_apart(theme, eye):
    """10 in CIELAB is four times what is just seen side by side."""
    for a, b in combinations(theme.colours, 2):
        assert np.linalg.norm(lab(a, eye) - lab(b, eye)) > 10, (a, b)


@themes
def test_text_has_contrast(theme):
    def contrast(a: str, b: str) -> float:
        light, dark = sorted((brightness(a), brightness(b)), reverse=True)
        return (light + 0.05) / (dark + 0.05)

    for paper in (theme.paper, theme.panel):
        assert contrast(theme.ink, paper) > 7 and contrast(theme.faint, paper) > 4.5
    assert all(contrast(contrasting(colour), colour) > 4.5 for colour in theme.colours)
    assert all(contrast(theme.colour(i), theme.panel) > 1.9 for i in range(14))


@themes
def test_a_second_round_has_colours_of_its_own(theme):
    assert len({theme.colour(i) for i in range(3 * len(theme.colours))}) == 3 * len(theme.colours)
    assert mixed("#000000", "#FFFFFF", 0.5) == "#808080"


# --- names ---


def test_loras_are_called_by_their_files():
    assert labels(["people/Alice.safetensors", "ink.v2.safetensors"]) == ["Alice", "ink.v2"]
    assert labels(["a/x.safetensors", "b\\x.safetensors", "y"]) == ["a/x.safetensors", "b\\x.safetensors", "y"]


def test_letters_that_the_font_lacks_are_not_drawn_as_boxes():
    accented = "Zoë" if has_letters("ë") else "Zoe"
    assert labels(["角色.safetensors", "Zoë.safetensors", "水.safetensors"]) == ["LoRA 1", accented, "LoRA 3"]
    assert labels(["é.safetensors", "e.safetensors"]) == ["LoRA 1", "LoRA 2"] or has_letters("é")
    assert labels(["x", "x"]) == ["LoRA 1", "LoRA 2"]
    assert labels(["ink™.safetensors"]) == ["ink™" if has_letters("™") else "inkTM"], "what it has stays"
    assert has_letters("plain ASCII (v2)") and not has_letters("水墨")


def test_a_long_name_leaves_its_middle_out():
    short = fitted(measure(), LONG + "end", 120, 13)
    assert " ... " in short and short.startswith("a") and short.endswith("d")
    assert measure().textlength(short, font(13)) <= 120


def test_a_name_of_several_lines_is_drawn_in_one():
    """Guards: where a file is called so, no chart and no sheet could be drawn."""
    assert fitted(measure(), "two\nlines", 120, 13) == "two lines"
    assert labels(["two\nlines.safetensors", "tab\t.safetensors"]) == ["LoRA 1", "LoRA 2"]


@pytest.mark.parametrize("most", [1, 2, 3, 9])
def test_a_text_takes_as_many_lines_as_it_may(most):
    """All but the last are full, and the last says what is left as far as it fits."""
    words = [f"word{k}" for k in range(20)]
    lines = wrapped(measure(), " ".join(words), 200, 13, most)
    assert all(measure().textlength(line, font(13)) <= 200 for line in lines)
    said = " ".join(lines).split()
    if most == 9:
        assert said == words and 3 < len(lines) < 9
    else:
        assert len(lines) == most and " ... " in lines[-1] and lines[-1].endswith("9")
        assert " ".join(lines[:-1]).split() == words[:len(" ".join(lines[:-1]).split())]
    assert all(measure().textlength(f"{line} {after.split()[0]}", font(13)) > 200
               for line, after in zip(lines, lines[1:], strict=False))
