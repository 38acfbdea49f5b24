//! How a camera was held, as a file's EXIF says.

use std::io::Cursor;

use image::metadata::Orientation;
use image::{DynamicImage, ImageDecoder, ImageReader, RgbImage};

use crate::caption::Pixels;

/// What turns a picture upright, by its EXIF (of a JPEG, PNG, WebP or TIFF).
///
/// It is done to the model's square, which stretching made of the picture: that is as if the picture had been turned
/// before, to a level of rounding, and takes no memory for another large one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Turn(Orientation);

impl Turn {
    /// Of an encoded image. What cannot be read asks for none.
    pub fn of(bytes: &[u8]) -> Self {
        let reader = ImageReader::new(Cursor::new(bytes)).with_guessed_format().ok();
        let mut decoder = reader.and_then(|reader| reader.into_decoder().ok());
        let orientation = decoder.as_mut().and_then(|decoder| decoder.orientation().ok());
        Self(orientation.unwrap_or(Orientation::NoTransforms))
    }

    /// Width and height of the picture when it is upright.
    pub fn size(self, (width, height): (u32, u32)) -> (u32, u32) {
        use Orientation::{Rotate90, Rotate90FlipH, Rotate270, Rotate270FlipH};
        match self.0 {
            Rotate90 | Rotate270 | Rotate90FlipH | Rotate270FlipH => (height, width),
            _ => (width, height),
        }
    }

    /// The square, upright.
    pub fn apply(self, pixels: Pixels) -> Pixels {
        if self.0 == Orientation::NoTransforms {
            return pixels;
        }
        let side = pixels.size();
        let square = RgbImage::from_raw(side as u32, side as u32, pixels.data().to_vec());
        let upright = square.and_then(|square| {
            let mut square = DynamicImage::ImageRgb8(square);
            square.apply_orientation(self.0);
            Pixels::new(side, square.into_rgb8().into_raw()).ok()
        });
        upright.unwrap_or(pixels)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use image::{ExtendedColorType, ImageEncoder, Rgb};

    /// A JPEG with this value of the EXIF tag.
    fn jpeg(orientation: u8) -> Vec<u8> {
        let picture = RgbImage::new(32, 16);
        let mut file = Vec::new();
        let mut encoder = image::codecs::jpeg::JpegEncoder::new_with_quality(&mut file, 95);
        // Big-endian TIFF: one directory of one entry, 0x0112, of one 16-bit number.
        let exif = [b"MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0", &[orientation][..], b"\0\0\0\0\0\0"].concat();
        encoder.set_exif_metadata(exif).unwrap();
        encoder.write_image(&picture, 32, 16, ExtendedColorType::Rgb8).unwrap();
        file
    }

    /// Four corners in four colours: `1 2` above `3 4`.
    fn square() -> Pixels {
        let corner = |x, y| Rgb([1 + u8::from(x >= 4) + 2 * u8::from(y >= 4); 3]);
        Pixels::new(8, RgbImage::from_fn(8, 8, corner).into_raw()).unwrap()
    }

    #[test]
    fn a_picture_is_turned_as_its_exif_says() {
        // By EXIF 2.32, 4.6.4: where the first row and column of what is stored belong.
        for (orientation, corners, size) in [
            (1, [1, 2, 3, 4], (32, 16)),
            (2, [2, 1, 4, 3], (32, 16)),
            (3, [4, 3, 2, 1], (32, 16)),
            (4, [3, 4, 1, 2], (32, 16)),
            (5, [1, 3, 2, 4], (16, 32)),
            (6, [3, 1, 4, 2], (16, 32)),
            (7, [4, 2, 3, 1], (16, 32)),
            (8, [2, 4, 1, 3], (16, 32)),
            (0, [1, 2, 3, 4], (32, 16)),
            (99, [1, 2, 3, 4], (32, 16)),
        ] {
            let turn = Turn::of(&jpeg(orientation));
            let upright = turn.apply(square());
            let found = [(0, 0), (7, 0), (0, 7), (7, 7)].map(|(x, y)| upright.data()[(y * 8 + x) * 3]);
            assert_eq!((found, turn.size((32, 16))), (corners, size), "{orientation}");
        }
    }

    #[test]
    fn what_has_no_exif_or_is_no_image_is_left_as_it_is() {
        for bytes in [&b""[..], b"no image", &jpeg(6)[..10]] {
            assert_eq!(Turn::of(bytes), Turn(Orientation::NoTransforms));
        }
        assert_eq!(Turn::of(b"").apply(square()).data(), square().data());
    }
}
