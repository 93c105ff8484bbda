"""The table of families, what each promises without torch, and families of other packages."""

import json
import subprocess
import sys
from dataclasses import replace

import pytest

from qpert.exporter.families import FAMILIES, family_names, find_family
from qpert.runtime.bundle.folder import Bundle
from qpert.runtime.errors import InputError

TOY = """
from qpert.exporter.families.base import FamilyCard
from qpert.exporter.families.blip2.family import Blip2Family


class Toy(Blip2Family):
    card = FamilyCard(name="toy", title="a family of another package", checkpoints="demo", stages=("none",))


FAMILY = Toy()
"""


@pytest.mark.parametrize("name", FAMILIES)
def test_a_family_is_called_what_its_row_says_and_offers_distinct_options(name):
    card = find_family(name).card
    assert card.name == name
    assert card.stages
    flags = [option.flag for option in card.options]
    assert len(set(flags)) == len(flags)


def test_looking_at_families_loads_no_torch():
    program = (
        "import sys, json\nfrom qpert.exporter.families import family_names, find_family\n"
        "cards = [find_family(name).card.title for name in family_names()]\n"
        "print(json.dumps([cards, 'torch' in sys.modules]))"
    )
    answer = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    titles, torch = json.loads(answer.stdout)
    assert len(titles) == len(family_names())
    assert not torch


def test_an_unknown_family_is_an_error_that_lists_them():
    with pytest.raises(InputError, match=", ".join(FAMILIES)) as caught:
        find_family("cocoa")
    assert caught.value.code == "family-unknown"


def test_a_family_of_another_package_is_found_by_its_entry_point_and_has_a_command(tmp_path):
    """A real installed distribution: a module and the metadata that pip would have written."""
    (tmp_path / "toy_family.py").write_text(TOY)
    info = tmp_path / "toy_family-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: toy-family\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[qpert.families]\ntoy = toy_family:FAMILY\n")
    program = (
        f"import sys; sys.path.insert(0, {str(tmp_path)!r})\nfrom qpert.runtime.cli import run\n"
        "sys.exit(run(['export', '--help']) or run(['export', 'toy', '--help']))"
    )
    answer = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert answer.returncode == 0, answer.stderr
    assert "a family of another package" in answer.stdout
    assert "--perturb [none]" in answer.stdout


def test_a_checkpoint_in_a_folder_with_and_in_its_name_is_opened_again(tiny_bundle):
    """Schema 1 joined two files by " and " and cut every source there."""
    manifest = Bundle.open(tiny_bundle).manifest
    family = find_family(manifest.family)
    record = replace(manifest.checkpoint, name="blip2", source="/data/cats and dogs/blip2.pth")
    source, options = family.reopening(replace(manifest, checkpoint=record), None)
    assert source == "/data/cats and dogs/blip2.pth"
    assert "vision_checkpoint" not in options
    source, _ = family.reopening(manifest, "/x/a and b/y.pth")
    assert source == "/x/a and b/y.pth"
    both = replace(record, parts={"vision": "/data/c and d/eva.pth"})
    source, options = family.reopening(replace(manifest, checkpoint=both), None)
    assert source == "/data/cats and dogs/blip2.pth"
    assert str(options["vision_checkpoint"]) == "/data/c and d/eva.pth"
