//! The stages of the flow, one file each. No stage imports another: [`crate::pipeline`] wires them.

pub mod batch;
pub mod commit;
pub mod consume;
pub mod decode;
pub mod fetch;
pub mod infer;
pub mod parse;
pub mod publish;
