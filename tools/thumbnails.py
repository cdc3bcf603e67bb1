"""The pictures of the example workflows in ComfyUI's template browser: example_workflows/NAME.jpg.

    python3 run.py _with - lora_ensemble.tools.thumbnails             all of them, and example_workflows/README.md
    python3 run.py _with - lora_ensemble.tools.thumbnails NAME ...    some of them, and that list

The front end shows the name of the file below; what the workflow is for is written on the picture. Each shows what its
method makes of LoRAs of the testbed, beside each of these alone. The sets come in the order of the fixed sample,
whatever is drawn for them: the second workflow about a method has the second set with so many LoRAs, and so on.
Workflows about figures show a part of their sheet in web/docs.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from PIL import Image, ImageDraw
from torch import Tensor

from ..engine.bank import Bank
from ..host.look.letters import font, wrapped
from ..host.look.theme import DARK
from ..methods.guidance.extrapolated import Extrapolation
from ..methods.merge import Merge
from ..methods.schedule import Uniform
from ..testbed.demo import REGIME
from ..testbed.evaluate import RECIPES
from ..testbed.protocol import LoraSet, some_sets
from ..testbed.sampler import Picture, Sampler
from ..testbed.weights import load_base, load_loras

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "example_workflows"
SIDE, LARGE = 384, 256
"""Of a thumbnail, which the front end shows in a square of 240 pixels and more, and of the picture in it."""
QUALITY = 80
SAMPLE = 480
"""Sets of the protocol that thumbnails may show, all of them."""
FAMILIES = {"sd15": "SD1.5", "sdxl": "SDXL", "flux": "Flux", "flux2": "Flux.2 Klein", "krea2": "Krea 2",
            "ltx23": "LTX-2.3", "minimax": "MiniMax H3", "qwen": "Qwen-Image", "wan22": "Wan 2.2",
            "z": "Z-Image Turbo"}
"""The first word of a workflow's name -> the models that it is for."""
Box = tuple[int, int, int, int]


@dataclass(frozen=True)
class Look:
    """What is on a thumbnail.

    title     what one opens the workflow for
    methods   recipes of the testbed, whose pictures are shown
    loras     how many of them
    about     what is written behind the name of the model
    strip     which of the steps do something, and what that is
    film      whether it makes one
    sheet     instead of pictures: a file of web/docs and the part of it that is shown
    """

    title: str
    methods: tuple[str, ...] = ("Routed",)
    loras: int = 3
    about: str = ""
    strip: tuple[str, tuple[bool, ...]] | None = None
    film: bool = False
    sheet: tuple[str, Box] | None = None


def _only(total: int, steps: Sequence[int]) -> tuple[bool, ...]:
    return tuple(step in steps for step in range(total))


EXTRAPOLATED = ("negative prompt", _only(30, Extrapolation(0.2).steps(30)))
UNTIL = ("negative prompt", _only(30, range(18)))
CACHED = ("whole model", _only(30, [i for i in range(30) if i % Uniform().interval == 0]))
LOOKS = {
    "flux2_klein_routed": Look("LoRAs where their words are, in 4 steps"),
    "flux_adaptive_guidance": Look("A negative prompt for Flux, at less cost", ("Merge",), strip=UNTIL),
    "flux_cache": Look("Three LoRAs at half the work", ("Composite",), strip=CACHED),
    "flux_cmlora": Look("LoRAs that take turns in the lead", ("CMLoRA",), about="CMLoRA"),
    "flux_k_lora": Look("A subject in a style", ("KLoRA",), 2, "K-LoRA"),
    "flux_loratorio": Look("The LoRA with most to say, patch by patch", ("LoRAtorio",), about="LoRAtorio"),
    "flux_merge": Look("A LoRA stack of another pack, merged", ("Merge",), about="Merge"),
    "flux_routed": Look("Each LoRA where its words are", about="Routed"),
    "krea2_routed": Look("LoRAs where their words are, in 8 steps", about="Routed"),
    "ltx23_distilled_routed": Look("A film with sound, in 8 steps", about="Routed", film=True),
    "minimax_h3_turbo_merge": Look("A film with sound, in 8 steps", ("Merge",), about="Merge", film=True),
    "qwen_image_lightning_routed": Look("LoRAs where their words are, with Lightning", about="few steps"),
    "qwen_image_routed": Look("Each LoRA where its words are", about="Routed"),
    "sd15_adaptive_guidance": Look("The negative prompt, as long as it matters", ("Composite",), strip=UNTIL),
    "sd15_cache": Look("Three LoRAs at half the work", ("Composite",), strip=CACHED),
    "sd15_calibrate_guidance": Look("Measure how much guidance can be saved", ("Merge",), strip=UNTIL),
    "sd15_compare": Look("Compare three methods", ("Merge", "Switch", "Composite")),
    "sd15_composite": Look("Every LoRA predicts, the mean counts", ("Composite",), about="Composite"),
    "sd15_est_lora": Look("A subject in a style, by energy", ("ESTLoRA",), 2, "EST-LoRA"),
    "sd15_leave_one_out": Look("What did each LoRA do?", sheet=("leave_one_out", (28, 128, 602, 522))),
    "sd15_loratorio": Look("The LoRA with most to say, patch by patch", ("LoRAtorio",), about="LoRAtorio"),
    "sd15_methods_grid": Look("Compare five methods", ("Merge", "Switch", "Composite", "CMLoRA", "LoRAtorio")),
    "sd15_spectrum": Look("Which LoRA makes fine detail?", sheet=("spectrum", (28, 80, 640, 500))),
    "sdxl_adaptive_guidance": Look("The negative prompt, as long as it matters", ("Merge",), strip=UNTIL),
    "sdxl_cmlora": Look("LoRAs that take turns in the lead", ("CMLoRA",), about="CMLoRA"),
    "sdxl_est_lora_measured": Look("A subject in a style, measured first", ("ESTLoRA",), 2, "EST-LoRA"),
    "sdxl_extrapolated_guidance": Look("30 % less work with a negative prompt", ("Merge",), strip=EXTRAPOLATED),
    "sdxl_four_loras": Look("Four LoRAs in one node", loras=4, about="start here"),
    "sdxl_k_lora": Look("A subject in a style, and who acts where", ("KLoRA",), 2, "K-LoRA",
                        sheet=("layer_map", (214, 132, 935, 628))),
    "sdxl_lightning_routed": Look("LoRAs where their words are, with Lightning", about="few steps"),
    "sdxl_lora_info": Look("What is in a LoRA file?", sheet=("info", (20, 104, 700, 572))),
    "sdxl_loratorio_masks": Look("LoRAs in masks you draw", ("Masks",), about="LoRAtorio"),
    "sdxl_prompt": Look("See which words are whose", ("Merge",), about="Ensemble Prompt"),
    "sdxl_routed": Look("Two characters and a style, each in its place", about="Routed"),
    "sdxl_routed_masks": Look("A mask for one, words for the other", about="Routed"),
    "sdxl_switch": Look("One LoRA at a time, in turns", ("Switch",), about="Switch"),
    "sdxl_three_loras.app": Look("Three LoRAs, a prompt, a button", about="an app"),
    "wan22_lightx2v_routed": Look("A film in 4 steps, LoRAs in pairs", about="Routed", film=True),
    "wan22_routed": Look("A film, each LoRA where its words are", about="Routed", film=True),
    "z_image_turbo_routed": Look("LoRAs where their words are, in 8 steps", about="Routed"),
}  # fmt: skip
"""Workflow -> its thumbnail."""


def family(name: str) -> str:
    return FAMILIES[name.partition("_")[0]]


@cache
def sets(loras: int) -> list[LoraSet]:
    """Those of the sample with so many LoRAs that say their layout: of two, a character and a style; of three, things
    that have places."""
    with_style = {2: True, 3: False}
    return [found for found in some_sets(SAMPLE) if len(found.concepts) == loras and found.laid_out
            and with_style.get(loras) in (None, any(concept.category == "style" for concept in found.concepts))]


def turn(name: str) -> int:
    """How many workflows before this one show the same methods with as many LoRAs."""
    alike = [other for other, look in LOOKS.items() if (look.methods, look.loras) == (LOOKS[name].methods,
                                                                                      LOOKS[name].loras)]
    return alike.index(name)


def pictures_of(name: str, bank: Bank) -> list[Picture]:
    """What is drawn for a thumbnail: each LoRA alone, then the methods."""
    look = LOOKS[name]
    of = sets(look.loras)[turn(name)]
    alone = [Picture(of.prompt((concept,)), of.seed, (lora,), Merge((1.0,)))
             for concept, lora in zip(of.concepts, of.loras, strict=True)]
    return alone + [RECIPES[method].picture(of, bank) for method in look.methods]


def drawn(names: Sequence[str]) -> dict[str, list[Image.Image]]:
    """Workflow -> the pictures on its thumbnail."""
    names = [name for name in names if LOOKS[name].sheet is None]
    if not names:
        return {}
    with Sampler(load_base(), load_loras(REGIME)) as sampler:
        wanted = {name: pictures_of(name, sampler.bank) for name in names}
        images = iter(sampler.draw([picture for pictures in wanted.values() for picture in pictures]))
    return {name: [_image(next(images)) for _ in pictures] for name, pictures in wanted.items()}


def _image(one: Tensor) -> Image.Image:
    return Image.fromarray((one.clamp(0, 1) * 255).round().byte().movedim(0, -1).numpy())


def thumbnail(name: str, pictures: Sequence[Image.Image]) -> Image.Image:
    """What is drawn, what it is for, for which model."""
    look = LOOKS[name]
    sheet = Image.new("RGB", (SIDE, SIDE), DARK.paper)
    if look.sheet is not None:
        _figure(sheet, *look.sheet)
    else:
        alone, made = pictures[:look.loras], pictures[look.loras:]
        _one_method(sheet, made[0], alone) if len(made) == 1 else _several(sheet, made, look.methods)
    pen, top = ImageDraw.Draw(sheet), LARGE + 26
    if look.film:
        _holes(pen)
    if look.strip:
        _strip(pen, *look.strip)
    for line in wrapped(pen, look.title, SIDE - 16, 27, 2):
        pen.text((8, top), line, DARK.ink, font(27))
        top += 32
    about = " · ".join(part for part in (family(name), look.about) if part)
    pen.text((8, SIDE - 30), about, DARK.colours[0], font(20))
    return sheet


def _place(sheet: Image.Image, picture: Image.Image, box: Box) -> None:
    left, top, width, height = box
    sharp = width % picture.width == 0
    sheet.paste(picture.resize((width, height), Image.Resampling.NEAREST if sharp else Image.Resampling.BICUBIC),
                (left, top))


def _one_method(sheet: Image.Image, made: Image.Image, alone: Sequence[Image.Image]) -> None:
    """Large what comes out, small what went in, each LoRA in its colour."""
    _place(sheet, made, (0, 0, LARGE, LARGE))
    room = LARGE // len(alone)
    side = min(room - 4, SIDE - LARGE - 16)
    pen = ImageDraw.Draw(sheet)
    for i, one in enumerate(alone):
        left, top = LARGE + (SIDE - LARGE - side) // 2, i * room + (room - side) // 2
        pen.rectangle((left - 3, top - 3, left + side + 2, top + side + 2), DARK.colour(i))
        _place(sheet, one, (left, top, side, side))


def _several(sheet: Image.Image, made: Sequence[Image.Image], names: Sequence[str]) -> None:
    """Pictures of several methods, with their names."""
    rows = 2 if len(made) > 3 else 1
    across = -(-len(made) // rows)
    side = min(SIDE // across, LARGE // rows)
    for i, (one, name) in enumerate(zip(made, names, strict=True)):
        left, top = i % across * side, i // across * side + (LARGE - rows * side) // 2
        _place(sheet, one, (left, top, side, side))
        pen = ImageDraw.Draw(sheet)
        wide = pen.textlength(name, font(18))
        pen.rectangle((left, top + side - 24, left + wide + 10, top + side), DARK.paper)
        pen.text((left + 5, top + side - 23), name, DARK.ink, font(18))


def _figure(sheet: Image.Image, name: str, box: Box) -> None:
    with Image.open(ROOT / "web" / "docs" / f"{name}.png") as whole:
        part = whole.convert("RGB").crop(box).resize((SIDE, LARGE), Image.Resampling.LANCZOS)
    sheet.paste(part, (0, 0))


def _strip(pen: ImageDraw.ImageDraw, what: str, steps: Sequence[bool]) -> None:
    """A square for each step, bright where it does what is said."""
    pen.text((8, LARGE + 5), what, DARK.faint, font(16))
    left = 12 + pen.textlength(what, font(16))
    wide = (SIDE - 8 - left) / len(steps)
    for i, does in enumerate(steps):
        x = left + i * wide
        pen.rectangle((x, LARGE + 8, x + wide - 2, LARGE + 20), DARK.colours[0] if does else DARK.grid)


def _holes(pen: ImageDraw.ImageDraw) -> None:
    """The edges of a film over the large picture."""
    for left in (0, LARGE - 20):
        pen.rectangle((left, 0, left + 19, LARGE - 1), "#000000")
        for top in range(6, LARGE, 24):
            pen.rounded_rectangle((left + 5, top, left + 14, top + 12), 2, DARK.ink)


def listing() -> str:
    """The list of all examples as a page."""
    lines = ["# Examples", "", "In ComfyUI: *Workflow, Browse Templates, lora-ensemble*. With a server at hand, "
             "`http://127.0.0.1:8188/?template=sdxl_four_loras&source=lora-ensemble` opens one at once. The same "
             "workflows in API format are in `api/`, for `examples/queue_prompt.py`.", "",
             "| | for | file |", "| --- | --- | --- |"]
    lines += [f"| ![{look.title}]({name}.jpg) | **{look.title}**, {family(name)} | [{name}.json]({name}.json) |"
              for name, look in sorted(LOOKS.items(), key=lambda entry: (family(entry[0]), entry[0]))]
    return "\n".join([*lines, "", "The pictures are drawn on the [testbed](https://github.com/lora-ensemble/"
                      "lora-ensemble/tree/main/testbed), by `tools/thumbnails.py`.", ""])


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="example workflows, without .json")
    names = parser.parse_args(arguments).names or list(LOOKS)
    pictures = drawn(names)
    for name in names:
        path = FOLDER / f"{name}.jpg"
        thumbnail(name, pictures.get(name, ())).save(path, quality=QUALITY, optimize=True)
        sys.stdout.write(f"{path.relative_to(ROOT)}: {path.stat().st_size / 1024:.0f} KB\n")
    (FOLDER / "README.md").write_text(listing(), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
