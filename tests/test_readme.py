"""README.md's example draws what it asks for; the links of all pages lead somewhere."""
import os
import re
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
README = ROOT / "README.md"


def seed(number):
    torch.manual_seed(number + int(os.environ.get("SEED_OFFSET", "0")))


def blocks(page):
    """{heading: [Python block, ...]}, paths of data and model made absolute."""
    text = page.read_text()
    for path in ("data/mnist.npz", "assets/model.pt"):
        text = text.replace(f'"{path}"', f'"{(ROOT / path).as_posix()}"')
    found, heading = {}, ""
    for title, code in re.findall(r"^#+ (.+)|^```python\n([^`]+)", text, re.M):
        heading = title or heading
        if code:
            found.setdefault(heading, []).append(code)
    return found


@pytest.mark.parametrize("page", [README, *ROOT.glob("docs/*.md")])
def test_links_lead_somewhere(page):
    text = page.read_text()
    titles = re.findall(r"^#+ (.+)", text.lower(), re.M)
    anchors = [re.sub(r"[^\w\- ]", "", title).replace(" ", "-") for title in titles]
    for path, anchor in re.findall(r"\]\((?!http)([^)#]*)#?([^)]*)\)", text):
        assert (page.parent / path).exists()
        assert path or anchor in anchors


def test_readme_example_draws_what_it_asks_for():
    (code,) = sum(blocks(README).values(), [])
    shape = eval(re.search(r"\(\d+, \d, \d+, \d+\)", code)[0])
    code = re.sub(r"width=\d+", "width=8", code)
    code = re.sub(r"steps=\d+", "steps=2", code)
    seed(0)
    names = {"x0": torch.rand(4, *shape[1:]) * 2 - 1, "device": "cpu"}
    exec(code, names)
    assert names["x"].shape == shape
    assert names["x"].abs().max() <= 1
