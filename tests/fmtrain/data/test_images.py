"""Pictures of unusual depth and of formats that are none of a training set's."""

import io
import multiprocessing
import os
import subprocess
import warnings
from concurrent.futures import ThreadPoolExecutor
from threading import Event

import families
import numpy as np
import pytest
from families import IMAGE, assistant, photo, user
from PIL import Image, ImageFile

from fmtrain.data import images
from fmtrain.data.collator import Collator
from fmtrain.data.images import MAX_PIXELS, _read, image_size, open_image

RAMP = np.linspace(0, 1, 256).reshape(16, 16)
GRAY = np.rint(RAMP * 255).astype(np.uint8)


def stored(image: Image.Image, kind: str) -> dict:
    image.save(file := io.BytesIO(), kind)
    return {"bytes": file.getvalue(), "path": f"ramp.{kind.lower()}"}


DEEP = {
    "16-bit PNG": (Image.fromarray((RAMP * 65535).round().astype(np.uint16)), "PNG"),
    "16-bit TIFF": (Image.fromarray((RAMP * 65535).round().astype(np.uint16)), "TIFF"),
    "16-bit TIFF, large end first": (
        Image.frombytes("I;16B", (16, 16), (RAMP * 65535).round().astype(">u2").tobytes()),
        "TIFF",
    ),
    "floats in [0, 1]": (Image.fromarray(RAMP.astype(np.float32)), "TIFF"),
}


@pytest.mark.parametrize("name", DEEP)
def test_deep_pictures_keep_their_grays(name):
    """Pillow cuts everything above 255 off, so a 16-bit picture turned white."""
    pixels = np.asarray(open_image(stored(*DEEP[name])))
    assert (pixels == pixels[..., :1]).all()
    assert np.abs(pixels[..., 0].astype(int) - GRAY).max() <= 1


def test_a_deep_picture_in_memory():
    image = Image.fromarray((RAMP * 65535).round().astype(np.uint16))
    assert np.abs(np.asarray(open_image(image))[..., 0].astype(int) - GRAY).max() <= 1
    assert open_image(image.convert("I")).getextrema() == ((0, 255),) * 3


@pytest.mark.parametrize(
    ("values", "words"),
    [
        (np.array([[-1.0, 0.5]], np.float32), r"its values run from -1 to 0.5"),
        (np.array([[0, 300]], np.float32), r"its values run from 0 to 300"),
        (np.array([[0, np.nan]], np.float32), r"its values run from nan to nan"),
        (np.array([[-5, 70000]], np.int32), r"its values run from -5 to 70000"),
    ],
)
def test_a_depth_whose_white_nobody_knows_is_refused(values, words):
    with pytest.raises(ValueError, match=rf"image 'ramp.tiff' cannot be read: .*{words}"):
        open_image(stored(Image.fromarray(values), "TIFF"))


def test_the_collator_opens_no_picture_over_its_pixels():
    row = {"id": "r7", "images": [photo(1, 20, 16)]}
    row["messages"] = [user(IMAGE, "which?"), assistant("3")]
    processor = families.processor("llava")
    assert len(Collator(processor, max_pixels=320)([row])["pixel_values"]) == 1
    with pytest.raises(ValueError, match=r"row r7: .*320 pixels"):
        Collator(processor, max_pixels=319)([row])


EPS = (
    b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 16 16\n%%EndComments\n"
    b"0 0 16 16 rectfill\nshowpage\n%%EOF\n"
)


@pytest.mark.parametrize("read", [open_image, image_size])
def test_postscript_is_never_run(tmp_path, monkeypatch, read):
    """Pillow would hand it to Ghostscript, whatever the file is called."""
    for name in ("Popen", "run", "check_call", "call"):
        monkeypatch.setattr(subprocess, name, lambda *_, **__: pytest.fail("a program was started"))
    (tmp_path / "a.jpg").write_bytes(EPS)
    with pytest.raises(ValueError, match=r"image 'a.jpg' cannot be read: not an image in a format"):
        read("a.jpg", tmp_path)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "JPEG2000"])
def test_formats_of_training_sets(kind):
    image = Image.fromarray(np.stack([GRAY] * 3, axis=-1))
    assert open_image(stored(image, kind)).size == (16, 16)


@pytest.fixture
def cut(monkeypatch) -> dict:
    """A truncated picture, where a package has told Pillow to fill up such ones."""
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    whole = stored(photo(0), "PNG")
    return {"path": None, "bytes": whole["bytes"][: len(whole["bytes"]) // 2]}


TRUNCATED = "cannot be read: image file is truncated"


def test_a_truncated_picture_is_refused_while_another_thread_reads(cut):
    """The thread that came first leaves in between."""
    came, followed, left = Event(), Event(), Event()

    def first(image, name):
        came.set()
        assert followed.wait(60)

    def second(image, name):
        followed.set()
        assert left.wait(60)
        image.load()

    with ThreadPoolExecutor(2) as pool:
        reading = pool.submit(_read, stored(photo(0), "PNG"), ".", MAX_PIXELS, first)
        reading.add_done_callback(lambda _: left.set())
        assert came.wait(60)
        with pytest.raises(ValueError, match=TRUNCATED):
            pool.submit(_read, cut, ".", MAX_PIXELS, second).result()
    assert ImageFile.LOAD_TRUNCATED_IMAGES  # as it was for everybody else


def test_a_package_that_is_imported_while_a_thread_reads_changes_nothing(cut):
    def reads(image, name):
        ImageFile.LOAD_TRUNCATED_IMAGES = True
        with pytest.raises(ValueError, match=TRUNCATED):
            open_image(cut)

    ImageFile.LOAD_TRUNCATED_IMAGES = False
    _read(stored(photo(0), "PNG"), ".", MAX_PIXELS, reads)
    assert ImageFile.LOAD_TRUNCATED_IMAGES  # as that package wants it


def test_a_truncated_picture_in_memory_is_refused(cut):
    with pytest.raises(ValueError, match=TRUNCATED):
        open_image(Image.open(io.BytesIO(cut["bytes"])))


def test_a_process_that_is_forked_while_a_thread_reads_can_read(cut):
    """Whose thread, and the lock that it holds, are not there."""

    def reads(image, name):
        process = multiprocessing.get_context("fork").Process(target=_child, args=(cut,))
        with images._WHOLE_FILES_ONLY._lock, warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # threads and fork
            process.start()
        process.join(30)
        process.kill()
        return process.exitcode

    with ThreadPoolExecutor(1) as pool:
        whole = stored(photo(0), "PNG")
        assert pool.submit(_read, whole, ".", MAX_PIXELS, reads).result() == 7


def _child(cut: dict) -> None:
    ImageFile.LOAD_TRUNCATED_IMAGES = True
    try:
        open_image(cut)
    except ValueError:
        os._exit(7)
    os._exit(1)
