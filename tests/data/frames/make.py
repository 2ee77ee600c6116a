"""Makes the frames in this directory, with tools and libraries that are not ours: `lz4` 1.9 and `zstd` 1.5
of Debian, `pip install lz4 zstandard`. The tests make the same lines."""

import pathlib
import subprocess

import lz4.frame
import zstandard

HERE = pathlib.Path(__file__).parent
LINES = "".join(f'{{"id":{i % 200},"name":"user-{i % 7}"}}\n' for i in range(5000)).encode()


def tool(name, *command):
    (HERE / name).write_bytes(subprocess.run(command, input=LINES, capture_output=True, check=True).stdout)


tool("tool.lz4", "lz4", "-9", "-c")
tool("linked.lz4", "lz4", "-9", "-B4", "-BD", "-BX", "-c")
tool("tool.zst", "zstd", "-19", "-c")
(HERE / "python.lz4").write_bytes(lz4.frame.compress(LINES, compression_level=9))
(HERE / "python.zst").write_bytes(zstandard.ZstdCompressor(level=19).compress(LINES))
