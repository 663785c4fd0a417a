//! Demangles what is mangled, and nothing else.
//!
//! blazesym demangles by what language it believes a symbol to be of, and where
//! it believes none it tries C++. The C++ grammar has single letters for types:
//! a C function called `w` came out as `wchar_t`, `i` as `int`. So names are
//! demangled here, by their own prefix.

/// The name as its author wrote it; unchanged if it is not mangled, or not well.
pub(super) fn demangle(name: &str) -> String {
    // `_R`: Rust, v0. `_ZN...17h<hash>E`: Rust, legacy, which is well-formed C++
    // too and must be tried first. `_Z`: C++ (Itanium ABI).
    if (name.starts_with("_R") || name.starts_with("_ZN"))
        && let Ok(rust) = rustc_demangle::try_demangle(name)
    {
        // The alternate form leaves the hash out.
        return format!("{rust:#}");
    }
    if name.starts_with("_Z")
        && let Ok(symbol) = cpp_demangle::Symbol::new(name)
        && let Ok(cpp) = symbol.demangle()
    {
        return cpp;
    }
    name.to_owned()
}

#[cfg(test)]
mod tests {
    use super::demangle;

    /// Check that C names stay as they are, also those that the C++ grammar
    /// takes for types.
    #[test]
    fn c_names_stay() {
        for name in [
            "w", "i", "v", "main", "St", "Z", "_Z", "_R", "_start", "malloc",
        ] {
            assert_eq!(demangle(name), name);
        }
    }

    /// Check that C++ and both Rust manglings are undone.
    #[test]
    fn mangled_names_are_undone() {
        for (name, want) in [
            ("_ZN4leak6Holder4growEi", "leak::Holder::grow(int)"),
            ("_Znwm", "operator new(unsigned long)"),
            (
                "_ZN4core3fmt9Formatter3pad17h0123456789abcdefE",
                "core::fmt::Formatter::pad",
            ),
            ("_RNvCs1234_7mycrate3foo", "mycrate::foo"),
        ] {
            assert_eq!(demangle(name), want);
        }
    }
}
