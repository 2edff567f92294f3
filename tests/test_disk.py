import os

import pytest

from hqlt.disk import check_writable
from hqlt.errors import reason


def test_checking_a_writable_path_creates_nothing(tmp_path):
    (tmp_path / "file").touch()
    check_writable(tmp_path / "file")
    check_writable(tmp_path / "new" / "file")
    check_writable(tmp_path / "new" / "folder", folder=True)
    check_writable(tmp_path, folder=True)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize(
    ("name", "folder", "message"),
    [
        ("file", True, "file: expected a folder, found a file"),
        (".", False, "expected a file, found a folder"),
        ("file/new", False, "file is a file, not a folder"),
        ("closed/new/file", False, "closed/new/file: cannot be written there: "),
    ],
)
def test_an_unwritable_path_is_reported(tmp_path, name, folder, message):
    if not os.path.isdir("/proc"):
        pytest.skip("needs a folder in which not even root may write")
    (tmp_path / "file").touch()
    (tmp_path / "closed").symlink_to("/proc")
    with pytest.raises(OSError, match=r".") as refused:
        check_writable(tmp_path / name, folder=folder)
    assert message in reason(refused.value)
