"""Writes tests/fixtures/pillow: small images of every kind, and what Pillow makes of them.

    python -m pip install -r tests/reference/requirements-pillow.txt
    python tests/reference/pillow.py

`lossless/` and `lossy/` hold the images; `expected/NAME.SIZE.png` is the result of
`Image.open(f).convert("RGB").resize((SIZE, SIZE), BICUBIC)`, which is what the reference's image processor does.
The output depends on nothing but the versions of Pillow and numpy, so that a second run changes no file.
"""

import io
import shutil
import struct
from pathlib import Path

import numpy as np
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent / "fixtures" / "pillow"
SIZE = 64
LARGE = 384


def picture(width, height, channels, seed=0):
    """Gradients and stripes with noise on the right: smooth areas, edges and the worst case for rounding."""
    rng = np.random.default_rng([seed, width, height, channels])
    y, x = np.mgrid[0:height, 0:width]
    planes = []
    for channel in range(channels):
        plane = 127 + 90 * np.sin((x * (channel + 1) + y * 2) / 11) + 60 * ((x // 7 + y // 5 + channel) % 2) - 30
        noise = rng.integers(0, 256, (height, width))
        planes.append(np.where(x > width * 0.7, noise, plane))
    pixels = np.clip(np.stack(planes, -1), 0, 255).astype(np.uint8)
    return pixels[..., 0] if channels == 1 else pixels


def rgb(width, height, seed=0):
    return Image.fromarray(picture(width, height, 3, seed), "RGB")


def rgba(width, height):
    return Image.fromarray(picture(width, height, 4), "RGBA")


def grey(width, height):
    return Image.fromarray(picture(width, height, 1), "L")


def grey_alpha(width, height):
    both = picture(width, height, 2)
    return Image.merge("LA", [Image.fromarray(both[..., i].copy(), "L") for i in range(2)])


def palette(width, height, colours=256):
    return rgb(width, height).quantize(colours, dither=Image.Dither.NONE)


def deep(width, height, channels):
    """16 bits a channel, big-endian, where the low byte is noise."""
    high = picture(width, height, channels).astype(np.uint16)
    low = np.random.default_rng(5).integers(0, 256, high.shape).astype(np.uint16)
    return high << 8 | low


def chunk(kind, data):
    import zlib

    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width, height, depth, colour, rows, extra=b""):
    """A PNG of any colour type; `rows` are packed scan lines."""
    import zlib

    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    data = b"".join(b"\0" + bytes(row) for row in rows)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + extra + chunk(b"IDAT", zlib.compress(data)) + chunk(b"IEND", b"")


def packed_png(width, height, depth, colour):
    """A grey (0) or palette (3) PNG of 1, 2 or 4 bits a pixel."""
    values = picture(width, height, 1) >> (8 - depth)
    bits = np.unpackbits(values[..., None], axis=2)[..., 8 - depth :].reshape(height, -1)
    entries = np.random.default_rng(depth).integers(0, 256, 3 << depth).astype(np.uint8).tobytes()
    extra = chunk(b"PLTE", entries) + chunk(b"tRNS", bytes([0, 128])) if colour == 3 else b""
    return png(width, height, depth, colour, np.packbits(bits, axis=1), extra)


def deep_png(width, height, channels):
    colour = {1: 0, 2: 4, 3: 2, 4: 6}[channels]
    return png(width, height, 16, colour, [row.astype(">u2").tobytes() for row in deep(width, height, channels)])


def saved(image, kind, **options):
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


def gif(screen, frame, transparent=None, local=False, interlace=0):
    """A GIF whose first frame covers a part of its screen. `frame` is (x, y, width, height)."""
    x, y, width, height = frame
    image = palette(width, height, 64)
    encoded = saved(image, "GIF", interlace=interlace)
    # Pillow writes header, global palette, then one image; its palette and its data are what is taken.
    flags = encoded[10]
    table = 3 << ((flags & 7) + 1)
    colours = encoded[13 : 13 + table]
    at = encoded.index(b",", 13 + table)
    data = encoded[at + 10 :]
    size_bits = flags & 7
    head = b"GIF89a" + struct.pack("<HHBBB", *screen, 0 if local else 0x80 | size_bits, 3, 0)
    control = b"" if transparent is None else b"!\xf9\x04" + struct.pack("<BHBB", 1, 0, transparent, 0)
    packed = (0x80 | size_bits if local else 0) | (0x40 if interlace else 0)
    descriptor = b"," + struct.pack("<HHHHB", x, y, width, height, packed)
    return head + (b"" if local else colours) + control + descriptor + (colours if local else b"") + data


def bmp16(width, height, masks):
    """A BMP of 16 bits a pixel with the given masks."""
    pixels = picture(width, height, 3).astype(np.uint32)
    value = np.zeros((height, width), np.uint32)
    for channel, mask in enumerate(masks):
        shift = (mask & -mask).bit_length() - 1
        bits = mask.bit_count()
        value |= (pixels[..., channel] >> (8 - bits)) << shift
    rows = [row.astype("<u2").tobytes() for row in value[::-1]]
    rows = [row + b"\0" * (-len(row) % 4) for row in rows]
    data = b"".join(rows)
    offset = 14 + 40 + 12
    info = struct.pack("<IiiHHIIiiII", 40, width, height, 1, 16, 3, len(data), 2835, 2835, 0, 0)
    head = b"BM" + struct.pack("<IHHI", offset + len(data), 0, 0, offset)
    return head + info + struct.pack("<III", *masks) + data


def lossless():
    """Name and bytes of every image whose pixels have one right value."""
    sizes = {
        "one-pixel": (1, 1),
        "column": (1, 57),
        "row": (61, 1),
        "two-by-three": (2, 3),
        "up": (23, 31),
        "same-width": (64, 140),
        "same-height": (140, 64),
        "same": (64, 64),
        "down": (171, 127),
        "prime": (397, 89),
        "portrait": (80, 130),
        "wide": (1500, 7),
        "tall": (5, 1600),
    }
    for name, size in sizes.items():
        yield f"rgb-{name}.png", saved(rgb(*size), "PNG")
    w, h = 97, 75
    yield "grey.png", saved(grey(w, h), "PNG")
    yield "grey-alpha.png", saved(grey_alpha(w, h), "PNG")
    yield "grey-transparent.png", saved(grey(w, h), "PNG", transparency=120)
    yield "rgba.png", saved(rgba(w, h), "PNG")
    yield "rgb-transparent.png", saved(rgb(w, h), "PNG", transparency=(127, 97, 97))
    yield "palette.png", saved(palette(w, h), "PNG")
    yield "palette-transparent.png", saved(palette(w, h), "PNG", transparency=7)
    yield "palette-alpha.png", saved(palette(w, h), "PNG", transparency=bytes(range(256)))
    for depth in (1, 2, 4):
        yield f"grey-{depth}-bit.png", packed_png(w, h, depth, 0)
        yield f"palette-{depth}-bit.png", packed_png(w, h, depth, 3)
    for channels, kind in ((1, "grey"), (2, "grey-alpha"), (3, "rgb"), (4, "rgba")):
        yield f"{kind}-16-bit.png", deep_png(w, h, channels)
    yield "rgb-24.bmp", saved(rgb(w, h), "BMP")
    yield "rgba-32.bmp", saved(rgba(w, h), "BMP")
    yield "grey-8.bmp", saved(grey(w, h), "BMP")
    yield "palette-8.bmp", saved(palette(w, h), "BMP")
    yield "mono-1.bmp", saved(grey(w, h).convert("1"), "BMP")
    yield "rgb-565.bmp", bmp16(w, h, (0xF800, 0x07E0, 0x001F))
    yield "rgb-555.bmp", bmp16(w, h, (0x7C00, 0x03E0, 0x001F))
    for compression in ("raw", "tiff_lzw", "tiff_adobe_deflate", "packbits"):
        yield f"rgb-{compression.replace('_', '-')}.tiff", saved(rgb(w, h), "TIFF", compression=compression)
    yield "grey.tiff", saved(grey(w, h), "TIFF")
    yield "rgba.tiff", saved(rgba(w, h), "TIFF")
    yield "mono.tiff", saved(grey(w, h).convert("1"), "TIFF")
    yield "mono-group4.tiff", saved(grey(w, h).convert("1"), "TIFF", compression="group4")
    yield "cmyk.tiff", saved(Image.fromarray(picture(w, h, 4), "CMYK"), "TIFF", compression="tiff_lzw")
    yield "grey-16-bit.tiff", saved(Image.fromarray(deep(w, h, 1)), "TIFF")
    yield "whole.gif", saved(palette(w, h, 64), "GIF")
    yield "interlaced.gif", gif((w, h), (0, 0, w, h), interlace=1)
    yield "transparent.gif", gif((w, h), (0, 0, w, h), transparent=5)
    yield "partial.gif", gif((w, h), (20, 10, 60, 50))
    yield "partial-transparent.gif", gif((w, h), (20, 10, 60, 50), transparent=5)
    yield "partial-local.gif", gif((w, h), (0, 30, 97, 40), local=True)
    yield "outgrown.gif", gif((40, 30), (10, 10, 60, 50))
    frames = [palette(w, h, 64), palette(w, h, 16)]
    yield "animated.gif", saved(frames[0], "GIF", save_all=True, append_images=frames[1:], duration=100)
    yield "rgb.webp", saved(rgb(w, h), "WEBP", lossless=True)
    yield "rgba.webp", saved(rgba(w, h), "WEBP", lossless=True, exact=True)
    yield "animated.webp", saved(
        rgb(w, h), "WEBP", lossless=True, save_all=True, append_images=[rgb(w, h, 1)], duration=100
    )


def lossy():
    """Name and bytes of images on which decoders may differ by a few levels."""
    smooth = rgb(310, 230).resize((250, 170), Image.Resampling.BICUBIC)
    rotated = Image.Exif()
    rotated[0x0112] = 6
    yield "444.jpg", saved(smooth, "JPEG", quality=90, subsampling=0)
    yield "420.jpg", saved(smooth, "JPEG", quality=90, subsampling=2)
    yield "422.jpg", saved(smooth, "JPEG", quality=90, subsampling=1)
    yield "progressive.jpg", saved(smooth, "JPEG", quality=85, progressive=True)
    yield "restarts.jpg", saved(smooth, "JPEG", quality=85, restart_marker_blocks=7)
    yield "rotated.jpg", saved(smooth, "JPEG", quality=90, exif=rotated)
    yield "grey.jpg", saved(smooth.convert("L"), "JPEG", quality=90)
    yield "cmyk.jpg", saved(smooth.convert("CMYK"), "JPEG", quality=90)
    yield "lossy.webp", saved(smooth, "WEBP", quality=85)


def reference(data):
    image = Image.open(io.BytesIO(data))
    if image.mode.startswith("I;16"):
        # Pillow clips 16-bit grey to white; the high byte is kept here, as Pillow does for 16-bit colours.
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB")
    return image.convert("RGB")


def main():
    shutil.rmtree(ROOT, ignore_errors=True)
    (ROOT / "expected").mkdir(parents=True)
    large = {"rgb-up.png"}
    for folder, images in (("lossless", lossless()), ("lossy", lossy())):
        (ROOT / folder).mkdir()
        for name, data in images:
            (ROOT / folder / name).write_bytes(data)
            for size in [SIZE] + [LARGE] * (name in large):
                result = reference(data).resize((size, size), Image.Resampling.BICUBIC)
                result.save(ROOT / "expected" / f"{name}.{size}.png", optimize=True)


main()
