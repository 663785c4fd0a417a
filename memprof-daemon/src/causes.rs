//! Errors for people.

use std::error::Error;

/// An error with what led to it, in one line; what one says of its cause itself is said once.
pub(crate) fn with_causes(error: &(dyn Error + 'static)) -> String {
    let mut message = error.to_string();
    let mut source = error.source();
    while let Some(error) = source {
        let cause = error.to_string();
        if !message.ends_with(&cause) {
            message += ": ";
            message += &cause;
        }
        source = error.source();
    }
    message
}

#[cfg(test)]
mod tests {
    use thiserror::Error;

    use super::*;

    #[derive(Debug, Error)]
    #[error("no entry")]
    struct Inner;

    #[derive(Debug, Error)]
    #[error("cannot look: {0}")]
    struct Talkative(#[source] Inner);

    #[derive(Debug, Error)]
    #[error("it does not start")]
    struct Terse(#[source] Talkative);

    /// Check that causes are told, each once.
    #[test]
    fn told_once() {
        let text = with_causes(&Terse(Talkative(Inner)));
        assert_eq!(text, "it does not start: cannot look: no entry");
    }
}
