//! Models from the Hugging Face hub, or a server that speaks its API, kept in the cache that its other clients use.

use std::fmt;
use std::io::IsTerminal;
use std::path::{Path, PathBuf};
use std::{env, fs};

use hf_hub::api::sync::{Api, ApiBuilder, ApiError, ApiRepo};
use hf_hub::{Cache, CacheRepo, Repo, RepoType};

use super::load::LoadError;
use super::weights::{INDEX, PICKLE, SINGLE, shard_names};

/// How often a broken download is taken up again.
const RETRIES: usize = 3;
/// How often a file is asked for that another process is downloading; the client waits 5 seconds for it each time.
const LOCK_ATTEMPTS: usize = 120;
/// Sizes of the model; no repository is without it.
const CONFIG: &str = "config.json";
/// Taken where the repository has them; the captioner says itself which of them it cannot do without.
const SMALL_FILES: [&str; 5] =
    [CONFIG, "preprocessor_config.json", "tokenizer.json", "tokenizer_config.json", "vocab.txt"];

/// A repository of models.
#[derive(Clone)]
pub struct HubSource {
    /// `organisation/name`.
    pub id: String,
    /// Branch, tag or commit; `main` where there is none.
    pub revision: Option<String>,
    /// Address of the hub; else `HF_ENDPOINT`, else huggingface.co.
    pub endpoint: Option<String>,
    /// For private and gated models; else `HF_TOKEN`, else what `hf auth login` stored.
    pub token: Option<String>,
    /// The cache's directory; else `hub` below `HF_HOME`, else `~/.cache/huggingface/hub`.
    pub cache: Option<PathBuf>,
}

impl HubSource {
    /// `organisation/name` or `organisation/name@revision`, all else from the environment.
    pub fn named(text: &str) -> Self {
        let (id, revision) = match text.split_once('@') {
            Some((id, revision)) => (id, Some(revision.to_owned())),
            None => (text, None),
        };
        Self { id: id.to_owned(), revision, endpoint: None, token: None, cache: None }
    }

    /// Where this machine's cache has the model's `config.json`, if it has. Nobody is asked.
    ///
    /// # Errors
    /// This is no name of a model.
    pub fn cached_config(&self) -> Result<Option<PathBuf>, LoadError> {
        check_name(self)?;
        Ok(self.open_cache().repo(self.named_repo()).get(CONFIG))
    }

    /// The model's `config.json` and nothing else, from the hub unless the cache has it: for those who want to know of
    /// a model without loading it.
    ///
    /// # Errors
    /// This is no name of a model, or the hub does not give the file.
    pub fn fetch_config(&self) -> Result<PathBuf, LoadError> {
        if let Some(path) = self.cached_config()? {
            return Ok(path);
        }
        let cache = self.open_cache();
        let api = client(self, &cache, false)?;
        let info = api.repo(self.named_repo()).info().map_err(|error| explain(self, "its file list", error))?;
        let path = Download::new(self, &api, &cache, &info.sha).file(CONFIG)?;
        remember(&cache, self, &info.sha);
        Ok(path)
    }

    fn open_cache(&self) -> Cache {
        self.cache.clone().map_or_else(Cache::from_env, Cache::new)
    }

    /// The repository under the name that was given: a branch may move.
    fn named_repo(&self) -> Repo {
        repo(self, self.revision.as_deref().unwrap_or("main"))
    }
}

impl fmt::Display for HubSource {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.id)?;
        self.revision.iter().try_for_each(|revision| write!(f, "@{revision}"))
    }
}

/// Without the token.
impl fmt::Debug for HubSource {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "HubSource({self})")
    }
}

/// A repository's files of one commit, on disk.
pub(super) struct Snapshot {
    pub(super) path: PathBuf,
    pub(super) revision: String,
}

/// Fetches what is not in the cache yet. When the hub cannot be reached, what the cache has is used.
pub(super) fn fetch(source: &HubSource) -> Result<Snapshot, LoadError> {
    check_name(source)?;
    let cache = source.open_cache();
    let wanted = source.named_repo();
    let api = client(source, &cache, std::io::stderr().is_terminal())?;
    let info = match api.repo(wanted.clone()).info() {
        Ok(info) => info,
        Err(error) => return cached(&cache.repo(wanted)).ok_or_else(|| explain(source, "its file list", error)),
    };
    let has = |name: &str| info.siblings.iter().any(|file| file.rfilename == name);
    let download = Download::new(source, &api, &cache, &info.sha);
    for name in SMALL_FILES.into_iter().filter(|name| has(name)) {
        download.file(name)?;
    }
    if has(SINGLE) {
        download.file(SINGLE)?;
    } else if has(INDEX) {
        let index = download.file(INDEX)?;
        let json = fs::read(&index)
            .map_err(|error| LoadError::Unreadable { file: index.display().to_string(), source: Box::new(error) })?;
        for name in shard_names(&json)? {
            download.file(&name)?;
        }
    } else if has(PICKLE) {
        download.file(PICKLE)?;
    } else {
        let reason = format!("the repository has none of {SINGLE}, {INDEX} and {PICKLE}");
        return Err(LoadError::Hub { id: source.to_string(), reason });
    }
    remember(&cache, source, &info.sha);
    Ok(Snapshot { path: download.local.pointer_path(&info.sha), revision: info.sha })
}

/// The name becomes part of a path and of an address.
fn check_name(source: &HubSource) -> Result<(), LoadError> {
    let plain = |part: &str| {
        !part.is_empty()
            && !part.starts_with('.')
            && part.chars().all(|c| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.'))
    };
    let revision = source.revision.as_deref().unwrap_or("main");
    if source.id.split('/').count() == 2 && source.id.split('/').all(plain) && revision.split('/').all(plain) {
        return Ok(());
    }
    let reason = "neither a folder that exists nor the name of a model: write organisation/name, or \
                  organisation/name@revision";
    Err(LoadError::Hub { id: source.to_string(), reason: reason.into() })
}

fn repo(source: &HubSource, revision: &str) -> Repo {
    Repo::with_revision(source.id.clone(), RepoType::Model, revision.to_owned())
}

fn client(source: &HubSource, cache: &Cache, progress: bool) -> Result<Api, LoadError> {
    let from_environment = |name: &str| env::var(name).ok().filter(|value| !value.is_empty());
    let mut builder = ApiBuilder::from_cache(cache.clone())
        .with_retries(RETRIES)
        .with_progress(progress)
        .with_user_agent("blipstream", env!("CARGO_PKG_VERSION"));
    if let Some(endpoint) = source.endpoint.clone().or_else(|| from_environment("HF_ENDPOINT")) {
        builder = builder.with_endpoint(endpoint.trim_end_matches('/').to_owned());
    }
    if let Some(token) = source.token.clone().or_else(|| from_environment("HF_TOKEN")) {
        builder = builder.with_token(Some(token));
    }
    builder.build().map_err(|error| explain(source, "a connection", error))
}

/// One commit of a repository, and the place where it is kept.
struct Download<'a> {
    source: &'a HubSource,
    remote: ApiRepo,
    local: CacheRepo,
    commit: &'a str,
}

impl<'a> Download<'a> {
    /// Of a commit, not of a branch, so that all files are of one piece even if the branch moves meanwhile.
    fn new(source: &'a HubSource, api: &Api, cache: &Cache, commit: &'a str) -> Self {
        let pinned = repo(source, commit);
        Self { source, remote: api.repo(pinned.clone()), local: cache.repo(pinned), commit }
    }

    fn file(&self, name: &str) -> Result<PathBuf, LoadError> {
        let kept = self.local.pointer_path(self.commit).join(name);
        for _ in 0..LOCK_ATTEMPTS {
            if kept.is_file() {
                return Ok(kept);
            }
            match self.remote.download(name) {
                Ok(path) => return Ok(path),
                // Another process of this machine is at it: its file will do.
                Err(ApiError::LockAcquisition(_)) => tracing::info!(file = name, "waiting for another download"),
                Err(error) => return Err(explain(self.source, name, error)),
            }
        }
        let reason = format!("another process has been downloading {name} for too long");
        Err(LoadError::Hub { id: self.source.to_string(), reason })
    }
}

/// Notes which commit the branch was at, so that the cache alone can answer when the hub is away.
fn remember(cache: &Cache, source: &HubSource, commit: &str) {
    if let Err(error) = cache.repo(source.named_repo()).create_ref(commit) {
        tracing::debug!(%error, "the cache does not take a note of the branch");
    }
}

/// The commit that the cache noted for a branch, if all its files seem to be there.
fn cached(local: &CacheRepo) -> Option<Snapshot> {
    let config = local.get(CONFIG)?;
    let path = config.parent()?.to_owned();
    let complete = path.join(SINGLE).is_file() || path.join(PICKLE).is_file() || has_all_shards(&path);
    let revision = path.file_name()?.to_str()?.to_owned();
    complete.then(|| {
        tracing::warn!(path = %path.display(), "the hub cannot be reached, the cached model is used");
        Snapshot { path, revision }
    })
}

fn has_all_shards(directory: &Path) -> bool {
    let names = fs::read(directory.join(INDEX)).ok().and_then(|json| shard_names(&json).ok());
    names.is_some_and(|names| names.iter().all(|name| directory.join(name).is_file()))
}

/// The hub's answers in words of what to do.
fn explain(source: &HubSource, what: &str, error: ApiError) -> LoadError {
    let text = error.to_string();
    let status = |code: u16| text.contains(&format!("status: {code}"));
    let reason = if status(404) {
        format!("the hub has no such model, revision or file ({what}): check the name")
    } else if status(401) || status(403) {
        format!(
            "the hub refuses access to {what}: the model does not exist, or is private or gated; set HF_TOKEN to a \
             token that may read it"
        )
    } else {
        format!("fetching {what} from the hub failed: {text}")
    };
    LoadError::Hub { id: source.to_string(), reason }
}
