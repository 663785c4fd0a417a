//! The file beside the prebuilt BPF object that says what it was made with.
//!
//! Also included by the build script of `memprof-daemon`, so it needs nothing
//! but the standard library. The format is the part of TOML that lines of
//! `key = "value"` are.

/// What is known of a BPF object.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Provenance {
    /// `rustc --version` of the compiler.
    pub(crate) compiler: String,
    /// The LLVM that the compiler has, and the linker must have.
    pub(crate) llvm: String,
    /// `bpf-linker --version`.
    pub(crate) linker: String,
    /// See `source_hash`.
    pub(crate) source_sha256: String,
    /// SHA-256 of the object itself.
    pub(crate) object_sha256: String,
}

impl Provenance {
    /// Reads what [`std::fmt::Display`] has written.
    ///
    /// # Errors
    ///
    /// The name of the key that is missing.
    pub(crate) fn parse(text: &str) -> Result<Self, &'static str> {
        let value = |key: &'static str| {
            text.lines()
                .filter_map(|line| line.split_once('='))
                .find(|(name, _)| name.trim() == key)
                .map(|(_, value)| value.trim().trim_matches('"').to_owned())
                .ok_or(key)
        };
        Ok(Self {
            compiler: value("compiler")?,
            llvm: value("llvm")?,
            linker: value("linker")?,
            source_sha256: value("source_sha256")?,
            object_sha256: value("object_sha256")?,
        })
    }
}

impl std::fmt::Display for Provenance {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        writeln!(f, "# Written by `cargo xtask ebpf`. Do not edit.")?;
        for (key, value) in [
            ("compiler", &self.compiler),
            ("llvm", &self.llvm),
            ("linker", &self.linker),
            ("source_sha256", &self.source_sha256),
            ("object_sha256", &self.object_sha256),
        ] {
            writeln!(f, "{key} = \"{value}\"")?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::Provenance;

    /// Check that what is written is read back, and a missing key is named.
    #[test]
    fn round_trip() {
        let provenance = Provenance {
            compiler: "rustc 1.96.0 (a = b)".into(),
            llvm: "22.1.8".into(),
            linker: "bpf-linker 0.10.3".into(),
            source_sha256: "00".into(),
            object_sha256: "ff".into(),
        };
        let text = provenance.to_string();
        assert_eq!(Provenance::parse(&text).unwrap(), provenance);
        assert_eq!(
            Provenance::parse(&text.replace("linker", "loader")),
            Err("linker")
        );
    }
}
