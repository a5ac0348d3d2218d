"""A slice of the campaign of benchmark/faults.py over the scripts as they are, and over one that has faults."""
import os
import re
import sys

import test_behaviour as tests

BENCHMARK = tests.ROOT / "benchmark"
FAULTS = {  # what mfql_offline.py says, what it says with a fault, and what the campaign says to that
    "if hashlib.sha256(contents[:-32]).digest() != contents[-32:]:": ("if False:", "checkpoint: (accepted|trace)"),
    'torch.set_rng_state(checkpoint["random_cpu"])': ("pass", "kill: [^:]*: resumed to something else"),
    'raise BadInput(f"{what}: {text}{hint}") from error': ("raise", "(hdf5|minari): trace"),
    "if not low <= value <= high:": ("if False:", "flag: accepted"),
}


def test_a_slice(tmp_path):
    command = [sys.executable, BENCHMARK / "faults.py", "--kills", "8", "--inputs", "60", "--seed", "7"]
    done = tests.process(command, env={**os.environ, "TMPDIR": str(tmp_path)})
    assert done.returncode == 0 and "68 kills and inputs" in done.stdout, done.stdout + done.stderr


def test_faults_are_seen(tmp_path):
    """In a copy of mfql_offline.py that has four of them."""
    text = (tests.ROOT / "mfql_offline.py").read_text()
    for right, (wrong, _) in FAULTS.items():
        assert text.count(right) == 1
        text = text.replace(right, wrong)
    (tmp_path / "mfql_offline.py").write_text(text)
    program = ("import sys, mfql_offline\n"
               f"sys.path.insert(0, {str(BENCHMARK)!r})\n"
               "import faults\n"
               "sys.exit(faults.main())\n")
    command = [sys.executable, "-c", program, "--script", "mfql_offline", "--kills", "1", "--inputs", "19"]
    done = tests.process(command, cwd=tmp_path, env={**os.environ, "TMPDIR": str(tmp_path)})
    assert done.returncode == 1, done.stderr
    for _, said in FAULTS.values():
        assert re.search(f"^VIOLATION {said}", done.stdout, re.MULTILINE), f"no {said} in\n{done.stdout}"
