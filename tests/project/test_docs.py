"""The documentation site."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_the_site_builds_without_a_warning():
    """A broken link, a missing anchor or a name that the API pages do not find is a warning."""
    lines = (
        (ROOT / 'Makefile').read_text().partition('\ndocs: ')[2].split('\n\n')[0].split('\n')[1:]
    )
    recipe = '\n'.join(lines).replace('$(RUN)', sys.executable)
    done = subprocess.run(['sh', '-ec', recipe], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    page = (ROOT / 'build/site/docs/api/vrwkv_ops.html').read_text()
    assert 'bi_wkv' in page and 'Tensor of the shape and dtype' in page
