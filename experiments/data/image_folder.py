"""A folder of images, one subfolder a class: `root/class/*.png`. Images are decoded when they are asked for."""

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from experiments.data.images import check_image_options, decode_image

EXTENSIONS = (".png", ".jpg", ".jpeg", ".bmp")


class ImageFolder:
    """Images below `root`, labelled by the subfolder they are in.

    Records are `{"image": float32 (height, width, channels) in [0, 1], "label": int32 ()}`, ordered by class and then
    by relative path, the same on every machine. Class names are sorted as text, so "10" comes before "2". Images may
    lie deeper in their class's folder; files with other extensions, and names that begin with a dot, are passed over.

    Args:
        root: the folder with one subfolder for each class.
        size: (height, width) that every image is brought to: cut to that aspect ratio around its centre, then resized;
            None leaves images as they are.
        channels: 3 for colour or 1 for grey.
        classes: the names of the classes, label 0 first; by default the subfolders. Give a validation folder the
            training folder's, so that labels mean the same even where a class is missing.
        extensions: the endings, in lower case, of the files to read.

    Attributes:
        classes: the names of the classes, label 0 first.
        paths: the files, in the order of the records.
        labels: int32 (records,).

    Raises:
        FileNotFoundError: the folder is not there, has no subfolders, or a subfolder has no images.
        ValueError: a subfolder is none of the given classes, or `size` or `channels` is out of range. A corrupt image
            raises when it is read.

    Example:
        >>> import tempfile
        >>> from PIL import Image
        >>> from experiments.data.pipeline import training_batches
        >>> with tempfile.TemporaryDirectory() as root:
        ...     for name in ("rose", "tulip"):
        ...         Path(root, name).mkdir()
        ...         Image.new("RGB", (20, 30)).save(Path(root, name, "0.png"))
        ...     source = ImageFolder(root, size=(16, 16))
        ...     batch = next(iter(training_batches(source, batch_size=2, seed=0)))
        >>> source.classes, batch["image"].shape, sorted(batch["label"].tolist())
        (('rose', 'tulip'), (2, 16, 16, 3), [0, 1])
    """

    def __init__(
        self,
        root: str | Path,
        *,
        size: tuple[int, int] | None,
        channels: int = 3,
        classes: Sequence[str] | None = None,
        extensions: Sequence[str] = EXTENSIONS,
    ):
        check_image_options(size, channels)
        self.root, self.size, self.channels = Path(root), size and tuple(size), channels
        if not self.root.is_dir():
            raise FileNotFoundError(f"{root} is not a folder, expected one with a subfolder of images for each class")
        folders = sorted(path.name for path in self.root.iterdir() if path.is_dir() and path.name[0] != ".")
        if not folders:
            raise FileNotFoundError(f"{root} has no subfolders, expected one for each class: {root}/class/image.png")
        self.classes = tuple(folders if classes is None else classes)
        unknown = [name for name in folders if name not in self.classes]
        if unknown:
            raise ValueError(f"{root} has subfolders {unknown} that are none of the classes {list(self.classes)}")
        found = {name: _find(self.root / name, tuple(extensions)) for name in self.classes if name in folders}
        self.paths = tuple(path for paths in found.values() for path in paths)
        counts = [len(found.get(name, ())) for name in self.classes]
        self.labels = np.repeat(np.arange(len(self.classes), dtype=np.int32), counts)

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        path = self.paths[index]
        return {
            "image": decode_image(path, str(path), size=self.size, channels=self.channels),
            "label": self.labels[index],
        }


def _find(folder: Path, extensions: tuple[str, ...]) -> list[Path]:
    paths = [
        Path(parent, name)
        for parent, _, names in os.walk(folder)
        for name in names
        if name.lower().endswith(extensions) and name[0] != "."
    ]
    if not paths:
        raise FileNotFoundError(f"{folder} has no images, expected files ending in {', '.join(extensions)}")
    return sorted(paths, key=lambda path: path.relative_to(folder).as_posix())
