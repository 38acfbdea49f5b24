//! Images of any size to the model's size, as the reference's image processor does it.
