//! What this program is: version, commit, wgpu and the APIs it can reach.

use std::sync::LazyLock;

use demask_benches::device::WGPU_VERSION;

/// The commit it was built from, with "-dirty" behind it for changes that were not committed; `None` where none was
/// known, as outside a repository. The variable `DEMASK_COMMIT` names one when it is built.
pub fn commit() -> Option<String> {
    let commit = env!("DEMASK_BUILT_FROM");
    (!commit.is_empty()).then(|| commit.to_owned())
}

/// One line, for `-V`.
pub fn short() -> &'static str {
    static LINE: LazyLock<String> = LazyLock::new(|| {
        let version = env!("CARGO_PKG_VERSION");
        let dirty = if env!("DEMASK_BUILT_FROM").ends_with("-dirty") { "-dirty" } else { "" };
        commit().map_or(version.into(), |full| {
            let hash: String = full.chars().take(10).collect();
            format!("{version} ({hash}{dirty})")
        })
    });
    &LINE
}

/// Several lines, for `--version`.
pub fn long() -> &'static str {
    static TEXT: LazyLock<String> = LazyLock::new(|| {
        let backends = wgpu::Instance::enabled_backend_features();
        let names: Vec<_> = backends.iter_names().map(|(name, _)| name.to_lowercase()).collect();
        format!(
            "{}\ncommit    {}\nwgpu      {WGPU_VERSION}\nbackends  {}\ntarget    {}",
            env!("CARGO_PKG_VERSION"),
            commit().as_deref().unwrap_or("unknown"),
            names.join(", "),
            env!("DEMASK_TARGET"),
        )
    });
    &TEXT
}
