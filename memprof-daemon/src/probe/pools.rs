//! Functions of a program's own pools, as the user names them: where their arguments are.

use std::{collections::HashSet, fmt, str::FromStr};

use memprof_common::{
    config::{Places, REGISTER_ARGUMENTS},
    function::Function,
};
use thiserror::Error;

use super::find;

/// A function of a pool.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PoolFunction {
    /// Its symbol, as it is in the file.
    pub symbol: String,
    /// What it does.
    pub function: Function,
    /// Where its arguments are.
    pub places: Places,
}

/// A function that hands out blocks: `NAME:size=ARG[,count=ARG][,return|,out=ARG]`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AllocatingFunction(PoolFunction);

/// A function that gives blocks up: `NAME:ptr=ARG`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FreeingFunction(PoolFunction);

/// What is wrong with the description of a function, and where.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[error("at character {}, `{}`: {what}", at + 1, rest)]
pub struct DescriptionError {
    /// Characters before.
    at: usize,
    /// From there on.
    rest: String,
    what: String,
}

/// Why functions cannot be traced together.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum PoolsError {
    /// There are two descriptions of it.
    #[error("`{0}` is named twice by --function and --free-function")]
    Twice(String),
    /// It is traced in any case.
    #[error(
        "`{0}` is a function of an allocator that memprof knows, and traced without --function"
    )]
    Known(String),
    /// Nothing would be given up by it.
    #[error("--free-function `{0}` needs a --function that hands out what it gives up")]
    NothingToFree(String),
}

/// The functions that are traced beside those of known allocators.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Pools(Vec<PoolFunction>);

impl Pools {
    /// All that are to be traced.
    ///
    /// # Errors
    ///
    /// [`PoolsError`]: they make no sense together.
    pub fn new(
        allocating: Vec<AllocatingFunction>,
        freeing: Vec<FreeingFunction>,
    ) -> Result<Self, PoolsError> {
        if let Some(first) = freeing.first()
            && allocating.is_empty()
        {
            return Err(PoolsError::NothingToFree(first.0.symbol.clone()));
        }
        let allocating = allocating.into_iter().map(|function| function.0);
        let all: Vec<_> = allocating
            .chain(freeing.into_iter().map(|function| function.0))
            .collect();
        let mut symbols = HashSet::new();
        for PoolFunction { symbol, .. } in &all {
            if find::is_known(symbol) {
                return Err(PoolsError::Known(symbol.clone()));
            }
            if !symbols.insert(symbol) {
                return Err(PoolsError::Twice(symbol.clone()));
            }
        }
        Ok(Self(all))
    }

    /// Whether there are none.
    #[must_use]
    pub const fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Each.
    pub fn iter(&self) -> impl Iterator<Item = &PoolFunction> {
        self.0.iter()
    }
}

impl fmt::Display for Pools {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let symbols: Vec<_> = self.iter().map(|pool| pool.symbol.as_str()).collect();
        f.write_str(&symbols.join(", "))
    }
}

impl FromStr for AllocatingFunction {
    type Err = DescriptionError;

    fn from_str(text: &str) -> Result<Self, DescriptionError> {
        let mut description = Description::read(text, &["size=", "count=", "out=", "return"])?;
        let out = description.take("out=");
        if let Some(value) = description.take("return")
            && out.is_some()
        {
            return Err(value.error("the block is either returned or stored by way of out="));
        }
        let places = Places {
            size: description.require("size=")?.place,
            count: description.take("count=").map(|value| value.place),
            out: out.map(|value| value.place),
        };
        Ok(Self(PoolFunction {
            symbol: description.symbol,
            function: Function::Pool,
            places,
        }))
    }
}

impl FromStr for FreeingFunction {
    type Err = DescriptionError;

    fn from_str(text: &str) -> Result<Self, DescriptionError> {
        let mut description = Description::read(text, &["ptr="])?;
        let places = Places {
            size: description.require("ptr=")?.place,
            ..Places::default()
        };
        Ok(Self(PoolFunction {
            symbol: description.symbol,
            function: Function::PoolFree,
            places,
        }))
    }
}

/// What is said of one argument, and where.
#[derive(Clone, Copy)]
struct Value<'a> {
    text: &'a str,
    /// Bytes before.
    at: usize,
    key: &'static str,
    /// Counted from 0; 0 where none is told.
    place: u8,
}

impl Value<'_> {
    fn error(&self, what: &str) -> DescriptionError {
        error(self.text, self.at, what)
    }
}

/// A name and what is said of its arguments.
struct Description<'a> {
    text: &'a str,
    symbol: String,
    values: Vec<Value<'a>>,
}

impl<'a> Description<'a> {
    /// Reads what there is behind the colon: each of `keys` once at most, each argument too.
    fn read(text: &'a str, keys: &[&'static str]) -> Result<Self, DescriptionError> {
        let Some((symbol, rest)) = text.split_once(':') else {
            let what = format!("`:` and {} are needed behind the name", all_of(keys));
            return Err(error(text, text.len(), &what));
        };
        let is_name = |c: char| !c.is_whitespace() && !c.is_control() && c != ',' && c != '=';
        if let Some(at) = symbol.find(|c| !is_name(c)) {
            return Err(error(text, at, "no symbol has such a character in it"));
        }
        if symbol.is_empty() {
            return Err(error(text, 0, "the name of a function is needed"));
        }
        let mut at = text.len() - rest.len();
        let mut values: Vec<Value<'a>> = Vec::new();
        for part in rest.split(',') {
            let value = value(text, at, part, keys)?;
            if values.iter().any(|other| other.key == value.key) {
                return Err(value.error(&format!("`{}` is there twice", value.key)));
            }
            let is_same =
                |other: &Value<'_>| takes_argument(other.key) && other.place == value.place;
            if takes_argument(value.key) && values.iter().any(is_same) {
                return Err(value.error("that argument is something else already"));
            }
            values.push(value);
            at += part.len() + 1;
        }
        Ok(Self {
            text,
            symbol: symbol.to_owned(),
            values,
        })
    }

    fn take(&mut self, key: &str) -> Option<Value<'a>> {
        let at = self.values.iter().position(|value| value.key == key)?;
        Some(self.values.swap_remove(at))
    }

    fn require(&mut self, key: &str) -> Result<Value<'a>, DescriptionError> {
        let text = self.text;
        self.take(key)
            .ok_or_else(|| error(text, text.len(), &format!("`{key}ARG` is needed")))
    }
}

fn takes_argument(key: &str) -> bool {
    key.ends_with('=')
}

/// Reads one part of a description, which begins at byte `at` of it.
fn value<'a>(
    text: &'a str,
    at: usize,
    part: &str,
    keys: &[&'static str],
) -> Result<Value<'a>, DescriptionError> {
    let matches = |key: &&&'static str| match takes_argument(key) {
        true => part.starts_with(**key),
        false => part == **key,
    };
    let key = keys.iter().find(matches).copied();
    let key = key.ok_or_else(|| error(text, at, &format!("{} is needed", all_of(keys))))?;
    let mut value = Value {
        text,
        at,
        key,
        place: 0,
    };
    if takes_argument(key) {
        let number = part.get(key.len()..).unwrap_or_default();
        let place = number
            .parse::<u8>()
            .ok()
            .filter(|number| (1..=REGISTER_ARGUMENTS).contains(number));
        let place = place.ok_or_else(|| {
            let what = format!("an argument is a number from 1 to {REGISTER_ARGUMENTS}");
            error(text, at + key.len(), &what)
        })?;
        value.place = place - 1;
    }
    Ok(value)
}

/// `size=ARG, count=ARG, out=ARG or return`
fn all_of(keys: &[&str]) -> String {
    let shown: Vec<String> = keys
        .iter()
        .map(|key| match takes_argument(key) {
            true => format!("{key}ARG"),
            false => (*key).to_owned(),
        })
        .collect();
    match shown.split_last() {
        Some((last, [])) => last.clone(),
        Some((last, others)) => format!("{} or {last}", others.join(", ")),
        None => String::new(),
    }
}

fn error(text: &str, at: usize, what: &str) -> DescriptionError {
    let (before, rest) = text.split_at_checked(at).unwrap_or((text, ""));
    DescriptionError {
        at: before.chars().count(),
        rest: rest.to_owned(),
        what: what.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn allocating(text: &str) -> Result<AllocatingFunction, DescriptionError> {
        text.parse()
    }

    fn freeing(text: &str) -> Result<FreeingFunction, DescriptionError> {
        text.parse()
    }

    fn places(text: &str) -> (u8, Option<u8>, Option<u8>) {
        let AllocatingFunction(PoolFunction {
            symbol,
            function,
            places,
        }) = allocating(text).unwrap();
        assert_eq!((symbol.as_str(), function), ("palloc", Function::Pool));
        (places.size, places.count, places.out)
    }

    /// Check that arguments are counted from 1, that their order does not matter, and that
    /// the result is the block unless another place is named.
    #[test]
    fn descriptions() {
        assert_eq!(places("palloc:size=1"), (0, None, None));
        assert_eq!(places("palloc:size=6,return"), (5, None, None));
        assert_eq!(places("palloc:return,size=2"), (1, None, None));
        assert_eq!(places("palloc:size=2,count=3"), (1, Some(2), None));
        assert_eq!(places("palloc:out=1,count=3,size=2"), (1, Some(2), Some(0)));
        let FreeingFunction(pool) = freeing("_ZN4Pool4freeEPv:ptr=2").unwrap();
        assert_eq!(pool.symbol, "_ZN4Pool4freeEPv");
        assert_eq!(pool.function, Function::PoolFree);
        assert_eq!(pool.places.size, 1);
        // Clones that compilers make, and versions.
        for symbol in ["palloc.constprop.0", "palloc@@V1", "$palloc"] {
            let AllocatingFunction(pool) = allocating(&format!("{symbol}:size=1")).unwrap();
            assert_eq!(pool.symbol, symbol);
        }
    }

    /// Check that what makes no sense is refused, and that the place is told.
    #[test]
    fn errors_tell_the_place() {
        for (text, at, what) in [
            ("", 1, "behind the name"),
            ("palloc", 7, "behind the name"),
            (":size=1", 1, "name of a function"),
            ("pal loc:size=1", 4, "such a character"),
            ("palloc,size=1", 14, "behind the name"),
            ("palloc:", 8, "size=ARG, count=ARG, out=ARG or return"),
            ("palloc:sise=1", 8, "size=ARG, count=ARG, out=ARG or return"),
            (
                "palloc:size=1,",
                15,
                "size=ARG, count=ARG, out=ARG or return",
            ),
            ("palloc:size=1, count=2", 15, "size=ARG"),
            ("palloc:size", 8, "size=ARG"),
            ("palloc:size=", 13, "from 1 to 6"),
            ("palloc:size=0", 13, "from 1 to 6"),
            ("palloc:size=7", 13, "from 1 to 6"),
            ("palloc:size=-1", 13, "from 1 to 6"),
            ("palloc:count=2,size=x", 21, "from 1 to 6"),
            ("palloc:size=1,size=2", 15, "twice"),
            ("palloc:size=1,count=1", 15, "something else already"),
            ("palloc:size=2,return,out=1", 15, "either"),
            ("palloc:returns", 8, "size=ARG"),
            ("palloc:count=1", 15, "`size=ARG` is needed"),
            ("pällöc:sise=1", 8, "size=ARG"),
            ("palloc:ptr=1", 8, "size=ARG"),
        ] {
            let error = allocating(text).unwrap_err();
            assert_eq!(error.at + 1, at, "{text}: {error}");
            assert!(error.to_string().contains(what), "{text}: {error}");
        }
        for (text, at) in [
            ("pfree", 6),
            ("pfree:", 7),
            ("pfree:ptr=7", 11),
            ("pfree:size=1", 7),
            ("pfree:ptr=1,ptr=2", 13),
        ] {
            let error = freeing(text).unwrap_err();
            assert_eq!(error.at + 1, at, "{text}: {error}");
        }
    }

    /// Check that a function has one meaning, and that those of allocators need none.
    #[test]
    fn together() {
        let new = |functions: &[&str], frees: &[&str]| {
            let functions = functions.iter().map(|text| allocating(text).unwrap());
            let frees = frees.iter().map(|text| freeing(text).unwrap());
            Pools::new(functions.collect(), frees.collect())
        };
        let pools = new(&["a:size=1", "b:size=2"], &["c:ptr=1"]).unwrap();
        assert_eq!(pools.to_string(), "a, b, c");
        assert!(!pools.is_empty() && Pools::default().is_empty());
        assert_eq!(new(&[], &[]), Ok(Pools::default()));
        let twice = Err(PoolsError::Twice("a".to_owned()));
        assert_eq!(new(&["a:size=1", "a:size=2"], &[]), twice);
        assert_eq!(new(&["a:size=1"], &["a:ptr=1"]), twice);
        assert_eq!(new(&["b:size=1"], &["a:ptr=1", "a:ptr=1"]), twice);
        let known = Err(PoolsError::Known("malloc".to_owned()));
        assert_eq!(new(&["malloc:size=1"], &[]), known);
        let nothing = Err(PoolsError::NothingToFree("a".to_owned()));
        assert_eq!(new(&[], &["a:ptr=1"]), nothing);
    }
}
