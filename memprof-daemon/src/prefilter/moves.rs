//! Places in functions' first instructions, and the same in an image: a thread that stands at
//! one can go on at the other.
//!
//! At an attach, a thread that has executed some of the instructions that a jump is to take the
//! place of goes on with their copies. When the jumps are gone again, one that is in the copies,
//! or on the way to a stub, goes on in the function itself.

/// Two places with the same meaning.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Move {
    /// In the function.
    pub text: u64,
    /// In the image.
    pub image: u64,
}

/// Where in the image a thread goes on that stands at `text`, within the displaced
/// instructions of a function.
pub(super) fn into_image(moves: &[Move], text: u64) -> Option<u64> {
    let found = moves.iter().find(|one| one.text == text);
    found.map(|one| one.image)
}

/// Where in the function a thread goes on that stands at `image`.
pub(super) fn into_text(moves: &[Move], image: u64) -> Option<u64> {
    let found = moves.iter().find(|one| one.image == image);
    found.map(|one| one.text)
}
