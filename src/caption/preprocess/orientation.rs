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

    /// A JPEG that is red at the top as it is stored, with this value of the EXIF tag.
    fn jpeg(orientation: u8) -> Vec<u8> {
        let picture = RgbImage::from_fn(32, 16, |_, y| if y < 8 { Rgb([250, 0, 0]) } else { Rgb([0, 0, 250]) });
        let mut file = Vec::new();
        let mut encoder = image::codecs::jpeg::JpegEncoder::new_with_quality(&mut file, 95);
        // Big-endian TIFF: one directory of one entry, 0x0112, of one 16-bit number.
        let exif = [b"MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0", &[orientation][..], b"\0\0\0\0\0\0"].concat();
        encoder.set_exif_metadata(exif).unwrap();
        encoder.write_image(&picture, 32, 16, ExtendedColorType::Rgb8).unwrap();
        file
    }

    fn square() -> Pixels {
        let red_above = |_, y| if y < 4 { Rgb([250, 0, 0]) } else { Rgb([0, 0, 250]) };
        Pixels::new(8, RgbImage::from_fn(8, 8, red_above).into_raw()).unwrap()
    }

    #[test]
    fn a_picture_is_turned_as_its_exif_says() {
        // By EXIF 2.32, 4.6.4: where the top row of what is stored belongs.
        for (orientation, red_at, size) in [
            (1, [3, 0], (32, 16)),
            (3, [3, 7], (32, 16)),
            (4, [3, 7], (32, 16)),
            (6, [7, 3], (16, 32)),
            (8, [0, 3], (16, 32)),
            (0, [3, 0], (32, 16)),
            (99, [3, 0], (32, 16)),
        ] {
            let turn = Turn::of(&jpeg(orientation));
            let upright = turn.apply(square());
            let [x, y] = red_at;
            let first = (y * 8 + x) * 3;
            assert_eq!(upright.data()[first..first + 3], [250, 0, 0], "{orientation}");
            assert_eq!(turn.size((32, 16)), size, "{orientation}");
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
