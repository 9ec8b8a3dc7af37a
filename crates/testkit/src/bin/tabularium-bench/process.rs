//! What the kernel says about a process: CPU time and memory, from `/proc`.

use std::{fs, time::Duration};

use anyhow::{Context as _, Result};

/// User and system time of a process so far.
pub(crate) fn cpu_time(pid: u32) -> Result<Duration> {
    let text = fs::read_to_string(format!("/proc/{pid}/stat")).with_context(|| format!("process {pid}"))?;
    // The command's name stands in parentheses and may hold spaces; count the fields after it.
    let (_, rest) = text.rsplit_once(')').context("no command name in stat")?;
    let fields: Vec<&str> = rest.split_whitespace().collect();
    let user: u64 = fields.get(11).context("no utime")?.parse()?;
    let system: u64 = fields.get(12).context("no stime")?.parse()?;
    let ticks = rustix::param::clock_ticks_per_second();
    Ok(Duration::from_secs_f64((user + system) as f64 / ticks as f64))
}

/// The same to the nanosecond, of threads that run still.
pub(crate) fn exact_cpu_time(pid: u32) -> Result<Duration> {
    let mut total = Duration::ZERO;
    for thread in fs::read_dir(format!("/proc/{pid}/task")).with_context(|| format!("process {pid}"))? {
        let text = fs::read_to_string(thread?.path().join("schedstat")).context("no scheduler statistics")?;
        let nanoseconds = text.split_whitespace().next().context("no time on a processor")?;
        total += Duration::from_nanos(nanoseconds.parse()?);
    }
    Ok(total)
}

fn status_kibibytes(pid: u32, key: &str) -> Result<u64> {
    let text = fs::read_to_string(format!("/proc/{pid}/status")).with_context(|| format!("process {pid}"))?;
    let line = text.lines().find(|line| line.starts_with(key)).with_context(|| format!("no {key}"))?;
    let number = line.split_whitespace().nth(1).with_context(|| format!("no number after {key}"))?;
    Ok(number.parse()?)
}

/// Resident memory now, in MiB.
pub(crate) fn resident_mebibytes(pid: u32) -> Result<f64> {
    Ok(status_kibibytes(pid, "VmRSS:")? as f64 / 1024.0)
}

/// Highest resident memory since the last [`reset_peak`], in MiB.
pub(crate) fn peak_mebibytes(pid: u32) -> Result<f64> {
    Ok(status_kibibytes(pid, "VmHWM:")? as f64 / 1024.0)
}

/// Starts the peak anew from what is resident now.
pub(crate) fn reset_peak(pid: u32) -> Result<()> {
    fs::write(format!("/proc/{pid}/clear_refs"), "5").with_context(|| format!("process {pid}"))
}
