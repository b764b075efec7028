"""The pages: README.md's code runs, and links lead somewhere."""
import re
from pathlib import Path

import pytest
import torch

import ddpm_min
from ddpm_min import GaussianDiffusion, UNet

ROOT = Path(__file__).resolve().parent.parent
README = ROOT / "README.md"
PAGES = [README, *sorted(ROOT.glob("docs/*.md"))]


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


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    """Each relative link to a file here, each anchor to a heading of its page."""
    links = re.findall(r"\]\((?!https?:)([^)#]*)#?([^)]*)\)", page.read_text())
    for path, anchor in links:
        target = (page.parent / path).resolve() if path else page
        assert target.exists() and target.is_relative_to(ROOT), path
        if anchor:                          # as GitHub makes them of headings
            headings = re.findall(r"^#+ (.+)", target.read_text().lower(), re.M)
            plain = [re.sub(r"[^\w\- ]", "", heading) for heading in headings]
            assert anchor in [name.replace(" ", "-") for name in plain], anchor


def test_readme_code_draws_images(tmp_path, monkeypatch):
    """Its blocks in order, by a narrow network in two steps, end with images."""
    def narrow(shape=(1, 28, 28), width=48, classes=0):
        return UNet(shape, 8, classes)

    def two_steps(diffusion, steps=None):
        return [diffusion.T, diffusion.T // 2, 0]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(ddpm_min, "UNet", narrow)
    monkeypatch.setattr(GaussianDiffusion, "times", two_steps)
    torch.manual_seed(0)
    shape = re.search(r"UNet\(\((\d+), (\d+), (\d+)\)", README.read_text()).groups()
    x0 = torch.rand(4, *map(int, shape)) * 2 - 1
    names = {"x0": x0}
    for code in sum(blocks(README).values(), []):
        exec(code, names)
    assert names["x"].shape[1:] == x0.shape[1:]
    assert names["x"].abs().max() <= 1
