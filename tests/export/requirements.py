"""What a wheel requires, a line each, without torch and what is built for one torch alone: `python -m ... WHEEL`.

vLLM's wheel for CPUs asks for builds of torch from an index of its own; with torch installed before, the rest is enough.
"""

import re
import sys
import zipfile

BUILT = re.compile(r"(torch|torchaudio|torchvision|torchcodec)\b")


def requirements(wheel: str) -> list[str]:
    """Of the wheel's metadata, without those of extras."""
    with zipfile.ZipFile(wheel) as file:
        name = next(name for name in file.namelist() if name.endswith(".dist-info/METADATA"))
        lines = file.read(name).decode().splitlines()
    found = [line.removeprefix("Requires-Dist: ") for line in lines if line.startswith("Requires-Dist: ")]
    return [line for line in found if "extra ==" not in line and not BUILT.match(line)]


if __name__ == "__main__":
    print("\n".join(requirements(sys.argv[1])))
