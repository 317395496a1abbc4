"""Lines of text as JSON, few and many, and the ways to pack them."""

import bz2
import gzip
import json
import lzma

import zstandard

LINE = json.dumps({"text": "a river and a lake"}) + "\n"
BULK = "".join(json.dumps({"text": f"river {number * 7919 % 10007}"}) + "\n" for number in range(3000)).encode()
PACK = {"gz": gzip.compress, "xz": lzma.compress, "zst": zstandard.compress, "bz2": bz2.compress}
