//! What the environment says about debuginfod, in the variables of elfutils' client
//! (`debuginfod-client-config(7)`).

use std::{ffi::OsString, path::PathBuf, time::Duration};

/// Why debuginfod cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum SettingsError {
    /// No server is named.
    #[error(
        "--debuginfod needs servers: set DEBUGINFOD_URLS, such as https://debuginfod.debian.net"
    )]
    NoServer,
    /// Only HTTP is spoken.
    #[error("DEBUGINFOD_URLS: {0:?} is no http:// or https:// address")]
    BadUrl(String),
    /// There is nowhere to keep what was downloaded.
    #[error("--debuginfod needs a cache directory: set DEBUGINFOD_CACHE_PATH or HOME")]
    NoCache,
    /// A limit that is none.
    #[error("{0} must be a whole number above 0")]
    BadNumber(&'static str),
}

/// Which servers, and what is allowed to them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Settings {
    /// Servers, in the order to try them.
    pub urls: Vec<String>,
    /// Where downloaded files are kept.
    pub cache: PathBuf,
    /// No larger file is kept.
    pub max_bytes: u64,
    /// A server has to begin its answer in that time.
    pub answer_within: Duration,
    /// And to complete it in that.
    pub complete_within: Duration,
}

impl Settings {
    /// Reads the environment.
    ///
    /// # Errors
    ///
    /// No server is named, or what is said makes no sense.
    pub fn from_env() -> Result<Self, SettingsError> {
        Self::of(|name| std::env::var_os(name))
    }

    fn of(variable: impl Fn(&str) -> Option<OsString>) -> Result<Self, SettingsError> {
        let variable = |name| variable(name).filter(|value| !value.is_empty());
        let number = |name: &'static str, default: u64| match variable(name) {
            None => Ok(default),
            Some(text) => text
                .to_str()
                .and_then(|text| text.trim().parse().ok())
                .filter(|&number| number > 0)
                .ok_or(SettingsError::BadNumber(name)),
        };
        let urls = variable("DEBUGINFOD_URLS").ok_or(SettingsError::NoServer)?;
        let urls = urls
            .to_string_lossy()
            .split_whitespace()
            // How elfutils is told to verify signatures; we have none to verify.
            .filter(|word| !word.starts_with("ima:"))
            .map(|url| {
                if url.starts_with("http://") || url.starts_with("https://") {
                    Ok(url.trim_end_matches('/').to_owned())
                } else {
                    Err(SettingsError::BadUrl(url.to_owned()))
                }
            })
            .collect::<Result<Vec<_>, _>>()?;
        if urls.is_empty() {
            return Err(SettingsError::NoServer);
        }
        let cache = variable("DEBUGINFOD_CACHE_PATH")
            .map(PathBuf::from)
            .or_else(|| {
                let caches = variable("XDG_CACHE_HOME")
                    .map(PathBuf::from)
                    .or_else(|| Some(PathBuf::from(variable("HOME")?).join(".cache")));
                Some(caches?.join("debuginfod_client"))
            })
            .ok_or(SettingsError::NoCache)?;
        Ok(Self {
            urls,
            cache,
            max_bytes: number("DEBUGINFOD_MAXSIZE", 2 << 30)?,
            answer_within: Duration::from_secs(number("DEBUGINFOD_TIMEOUT", 30)?),
            complete_within: Duration::from_secs(number("DEBUGINFOD_MAXTIME", 300)?),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn settings(variables: &[(&str, &str)]) -> Result<Settings, SettingsError> {
        Settings::of(|name| {
            let variable = variables.iter().find(|(known, _)| *known == name);
            variable.map(|(_, value)| OsString::from(value))
        })
    }

    /// Check the servers' order, that the cache is where elfutils has it, and the limits.
    #[test]
    fn reads_the_environment() {
        let urls = (
            "DEBUGINFOD_URLS",
            " http://a/  ima:enforcing https://b:1/x\t",
        );
        let read = settings(&[urls, ("HOME", "/root"), ("DEBUGINFOD_TIMEOUT", "7")]).unwrap();
        assert_eq!(read.urls, ["http://a", "https://b:1/x"]);
        assert_eq!(read.cache, PathBuf::from("/root/.cache/debuginfod_client"));
        assert_eq!(read.answer_within, Duration::from_secs(7));
        assert_eq!(read.complete_within, Duration::from_secs(300));
        let cache = |more: &[(&str, &str)]| {
            let variables = [&[urls, ("HOME", "/root")], more].concat();
            settings(&variables).unwrap().cache
        };
        let xdg = ("XDG_CACHE_HOME", "/x");
        assert_eq!(cache(&[xdg]), PathBuf::from("/x/debuginfod_client"));
        let own = ("DEBUGINFOD_CACHE_PATH", "/own");
        assert_eq!(cache(&[xdg, own]), PathBuf::from("/own"));
    }

    /// Check that nothing is guessed: no server, one that is none, no place to keep
    /// files, limits that are no numbers.
    #[test]
    fn refuses_what_makes_no_sense() {
        let home = ("HOME", "/root");
        for urls in [&[home][..], &[home, ("DEBUGINFOD_URLS", " ")]] {
            assert!(matches!(settings(urls), Err(SettingsError::NoServer)));
        }
        let bad = settings(&[home, ("DEBUGINFOD_URLS", "http://a ftp://b")]);
        assert!(matches!(bad, Err(SettingsError::BadUrl(url)) if url == "ftp://b"));
        let urls = ("DEBUGINFOD_URLS", "http://a");
        assert!(matches!(settings(&[urls]), Err(SettingsError::NoCache)));
        for number in ["0", "-1", "ten"] {
            let bad = settings(&[home, urls, ("DEBUGINFOD_MAXSIZE", number)]);
            assert!(matches!(bad, Err(SettingsError::BadNumber(_))), "{number}");
        }
    }
}
