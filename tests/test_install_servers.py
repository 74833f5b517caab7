# SPDX-License-Identifier: Apache-2.0
"""tools/install_servers.sh on machines with other programs: it installs where it may, and never fails."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

_SCRIPT = Path(__file__).parents[1] / "tools" / "install_servers.sh"
_LIBRARIES = "libibverbs.so.1 librdmacm.so.1 libnuma.so.1 libcurl.so.4"


def run(folder: Path, user: int, libraries: str, apt_get: str | None) -> subprocess.CompletedProcess[str]:
    """Run the script where `id`, `ldconfig` and `apt-get` say this and there is nothing else but grep."""
    programs = {
        "id": f"echo {user}",
        "ldconfig": f"echo {libraries}; [[ -e {folder}/more ]] && echo {_LIBRARIES}; true",
    }
    if apt_get is not None:
        programs["apt-get"] = apt_get
    for name, text in programs.items():
        (folder / name).write_text(f"#!/bin/bash\n{text}\n")
        (folder / name).chmod(0o755)
    script = folder / "script.sh"
    script.write_text(_SCRIPT.read_text().replace("PATH=$PATH:/usr/sbin:/sbin", f"PATH={folder}"))
    (folder / "grep").symlink_to("/bin/grep")
    return subprocess.run(["/bin/bash", str(script)], capture_output=True, text=True, timeout=60, check=True)


def test_who_has_all_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "redis-server").write_text("#!/bin/bash\n")
    (tmp_path / "redis-server").chmod(0o755)
    done = run(tmp_path, 0, _LIBRARIES, f"touch {tmp_path}/called")
    assert "are here" in done.stdout
    assert not (tmp_path / "called").exists()


def test_root_gets_what_is_missing(tmp_path: Path) -> None:
    server = tmp_path / "redis-server"
    apt_get = f'echo "$@" >>{tmp_path}/called; >{tmp_path}/more; >{server}; /bin/chmod +x {server}'
    done = run(tmp_path, 0, "libcurl.so.4", apt_get)
    assert "are here" in done.stdout
    called = (tmp_path / "called").read_text()
    assert "update" in called
    assert "redis-server libibverbs1" in called


@pytest.mark.parametrize(("user", "apt_get"), [(1000, "exit 1"), (0, None), (0, "exit 100")])
def test_others_are_told_what_is_skipped(tmp_path: Path, user: int, apt_get: str | None) -> None:
    done = run(tmp_path, user, "libcurl.so.4 libnuma.so.1", apt_get)
    assert "without redis-server, libibverbs.so.1, librdmacm.so.1: tests" in done.stderr
    assert "apt-get install redis-server" in done.stderr
