//! Which rank this process is, by the variables that torchrun, srun and `incipit launch` set.

use anyhow::Result;

use crate::exit::bad_input;

/// Where the ranks meet: `tcp://HOST:PORT` or `file:/DIRECTORY`.
pub(crate) const STORE: &str = "INCIPIT_STORE";
/// The process id of the launcher that started this process.
pub(crate) const LAUNCHER: &str = "INCIPIT_LAUNCHER";
/// Which start of the ranks this is: those of an earlier one are refused.
pub(crate) const EPOCH: &str = "INCIPIT_EPOCH";

const HOW_TO_START: &str = "start the ranks with `incipit launch --nproc N -- COMMAND`, with torchrun or with srun, or pass \
                            --collective local for threads of one process";

/// A rank's place, as the environment gives it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Place {
    pub(crate) rank: usize,
    pub(crate) world: usize,
    /// Its number among the ranks of this machine.
    pub(crate) local_rank: usize,
    pub(crate) meeting: Meeting,
    pub(crate) epoch: u64,
    pub(crate) job: String,
}

/// Where ranks find each other.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Meeting {
    /// A store that is there.
    At(String),
    /// A store that rank 0 serves.
    RankZero { host: String, port: u16 },
}

/// The variables by name; a function, so that tests need not change this process's own.
pub(crate) type Variables<'a> = &'a dyn Fn(&str) -> Option<String>;

/// This process's variables.
pub(crate) fn variables(name: &str) -> Option<String> {
    std::env::var(name).ok().filter(|value| !value.is_empty())
}

/// The names of the rank and of the number of ranks: torchrun's, or Slurm's where those are absent.
fn names(get: Variables<'_>) -> [&'static str; 2] {
    let slurm = get("RANK").is_none() && get("WORLD_SIZE").is_none() && get("SLURM_PROCID").is_some();
    if slurm { ["SLURM_PROCID", "SLURM_NTASKS"] } else { ["RANK", "WORLD_SIZE"] }
}

/// Rank and number of ranks, where the environment has both and they make sense: for what must be known before anything is
/// asked of the ranks.
pub(crate) fn glance(get: Variables<'_>) -> Option<(usize, usize)> {
    let [rank, world] = names(get).map(|name| get(name)?.trim().parse::<usize>().ok());
    rank.zip(world).filter(|(rank, world)| rank < world)
}

/// Ranks on this machine, where the environment tells.
pub(crate) fn on_this_machine(get: Variables<'_>) -> Option<usize> {
    let number = |name: &str| get(name)?.trim().parse::<usize>().ok().filter(|n| *n > 0);
    let (_, world) = glance(get)?;
    Some(number("LOCAL_WORLD_SIZE").or_else(|| number("SLURM_NTASKS_PER_NODE")).unwrap_or(world).min(world))
}

/// Whether this process is certainly one of several. (In a batch script Slurm tells the first of the tasks-to-be the same as
/// the first task, so that its rank 0 says nothing.)
pub(crate) fn one_of_several(get: Variables<'_>) -> Option<String> {
    let (rank, world) = glance(get)?;
    let [name, count] = names(get);
    let several = world > 1 && (name == "RANK" || rank > 0);
    several.then(|| format!("{name}={rank} and {count}={world}"))
}

/// The place of this process among the ranks.
///
/// # Errors
/// If a variable is missing, is no number, or contradicts another.
pub(crate) fn place(get: Variables<'_>) -> Result<Place> {
    let [rank_name, world_name] = names(get);
    let absent: Vec<&str> = [rank_name, world_name].into_iter().filter(|name| get(name).is_none()).collect();
    if !absent.is_empty() {
        let (what, verb) = (absent.join(" and "), if absent.len() == 1 { "is" } else { "are" });
        return bad_input(format!(
            "--collective gloo (or nccl) makes this process one of several ranks, and {what} {verb} not set; {HOW_TO_START}"
        ));
    }
    let (rank, world) = (number(get, rank_name)?, number(get, world_name)?);
    if rank >= world {
        return bad_input(format!(
            "{rank_name}={rank} contradicts {world_name}={world}: ranks count from 0 to {world_name} - 1"
        ));
    }
    let local_rank = local_rank(get, rank, world)?;
    let epoch_name = if get(EPOCH).is_some() { EPOCH } else { "TORCHELASTIC_RESTART_COUNT" };
    let epoch = get(epoch_name).map_or(Ok(0), |_| number(get, epoch_name))? as u64;
    let job = get("TORCHELASTIC_RUN_ID").or_else(|| get("SLURM_JOB_ID"));
    Ok(Place {
        rank,
        world,
        local_rank,
        meeting: meeting(get)?,
        epoch,
        job: job.unwrap_or_else(|| "incipit".to_owned()),
    })
}

fn number(get: Variables<'_>, name: &str) -> Result<usize> {
    let value = get(name).unwrap_or_default();
    value
        .trim()
        .parse()
        .or_else(|_| bad_input(format!("{name}={value} is no number: set it to a count from 0, or unset it")))
}

/// The rank on this machine: torchrun's, or Slurm's, or where nobody tells the rank itself. A wrong one tells of a wrong launcher.
fn local_rank(get: Variables<'_>, rank: usize, world: usize) -> Result<usize> {
    let one = |name: &'static str| get(name).map(|_| number(get, name)).transpose();
    let count = one("LOCAL_WORLD_SIZE")?;
    let Some(rank) = one("LOCAL_RANK")? else {
        return Ok(one("SLURM_LOCALID")?.unwrap_or(rank));
    };
    let (bound, of) = match count {
        Some(count) if count <= world => (count, "LOCAL_WORLD_SIZE"),
        Some(count) => {
            return bad_input(format!(
                "LOCAL_WORLD_SIZE={count} contradicts WORLD_SIZE={world}: a machine has not more ranks than all machines"
            ));
        }
        None => (world, "WORLD_SIZE"),
    };
    if rank >= bound {
        return bad_input(format!("LOCAL_RANK={rank} contradicts {of}={bound}: ranks count from 0"));
    }
    Ok(rank)
}

fn meeting(get: Variables<'_>) -> Result<Meeting> {
    if let Some(url) = get(STORE) {
        return Ok(Meeting::At(url));
    }
    let Some(host) = get("MASTER_ADDR").filter(|_| get("MASTER_PORT").is_some()) else {
        return bad_input(format!(
            "the ranks do not know where to meet: set MASTER_ADDR and MASTER_PORT to the machine of rank 0 and a free port of it, \
             or {STORE} to tcp://HOST:PORT or to file:/DIRECTORY that all can reach"
        ));
    };
    // torchrun's agent serves a store of its own at the port.
    let taken = get("TORCHELASTIC_USE_AGENT_STORE").is_some_and(|value| value.eq_ignore_ascii_case("true"));
    let given = number(get, "MASTER_PORT")?;
    match u16::try_from(given.saturating_add(usize::from(taken))) {
        Ok(port) if port > 0 => Ok(Meeting::RankZero { host, port }),
        _ => bad_input(format!("MASTER_PORT={given} is no port: set it to one from 1 to 65534")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parsed(pairs: &[(&str, &str)]) -> Result<Place, String> {
        with(pairs, |get| place(get).map_err(|error| error.to_string()))
    }

    fn with<T>(pairs: &[(&str, &str)], ask: impl Fn(Variables<'_>) -> T) -> T {
        ask(&|name| pairs.iter().find(|(key, _)| *key == name).map(|(_, value)| (*value).to_owned()))
    }

    const TORCHRUN: [(&str, &str); 6] = [
        ("RANK", "3"),
        ("WORLD_SIZE", "4"),
        ("LOCAL_RANK", "1"),
        ("LOCAL_WORLD_SIZE", "2"),
        ("MASTER_ADDR", "node1"),
        ("MASTER_PORT", "29500"),
    ];

    #[test]
    fn torchruns_variables_are_understood() {
        let found = parsed(&TORCHRUN).expect("a place");
        assert_eq!((found.rank, found.world, found.epoch), (3, 4, 0));
        assert_eq!(found.meeting, Meeting::RankZero { host: "node1".into(), port: 29500 });
        let agent = [("TORCHELASTIC_USE_AGENT_STORE", "True"), ("TORCHELASTIC_RESTART_COUNT", "2")];
        let found = parsed(&[&TORCHRUN[..], &agent].concat()).expect("a place");
        assert_eq!(found.meeting, Meeting::RankZero { host: "node1".into(), port: 29501 });
        assert_eq!(found.epoch, 2);
        assert_eq!(with(&TORCHRUN, on_this_machine), Some(2));
    }

    #[test]
    fn slurms_variables_stand_in_where_torchruns_are_absent() {
        let slurm = [("SLURM_PROCID", "1"), ("SLURM_NTASKS", "2"), ("SLURM_JOB_ID", "77")];
        let store = [(STORE, "file:/shared/meet")];
        let found = parsed(&[&slurm[..], &store].concat()).expect("a place");
        assert_eq!((found.rank, found.world, found.job.as_str()), (1, 2, "77"));
        assert_eq!(found.meeting, Meeting::At("file:/shared/meet".into()));
        let both = parsed(&[&slurm[..], &TORCHRUN].concat()).expect("a place");
        assert_eq!((both.rank, both.world), (3, 4));
    }

    #[test]
    fn what_is_missing_or_contradicts_is_named() {
        let without =
            |name: &str| TORCHRUN.iter().copied().filter(|(key, _)| *key != name).collect::<Vec<_>>();
        let and = |name: &'static str, value: &'static str| [without(name), vec![(name, value)]].concat();
        for (pairs, parts) in [
            (vec![], ["RANK and WORLD_SIZE", "incipit launch"]),
            (without("WORLD_SIZE"), ["WORLD_SIZE is not set", "torchrun"]),
            (without("MASTER_ADDR"), ["where to meet", "MASTER_ADDR"]),
            (and("RANK", "4"), ["RANK=4", "WORLD_SIZE=4"]),
            (and("RANK", "first"), ["RANK=first", "no number"]),
            (and("LOCAL_RANK", "2"), ["LOCAL_RANK=2", "LOCAL_WORLD_SIZE=2"]),
            (and("LOCAL_WORLD_SIZE", "5"), ["LOCAL_WORLD_SIZE=5", "WORLD_SIZE=4"]),
            (and("MASTER_PORT", "0"), ["MASTER_PORT=0", "65534"]),
            (and("MASTER_PORT", "70000"), ["MASTER_PORT=70000", "65534"]),
        ] {
            let message = parsed(&pairs).expect_err("refused");
            for part in parts {
                assert!(message.contains(part), "no {part:?} in {message}");
            }
        }
    }

    #[test]
    fn a_process_that_is_one_of_several_is_known_as_such() {
        assert_eq!(with(&TORCHRUN, one_of_several).as_deref(), Some("RANK=3 and WORLD_SIZE=4"));
        assert_eq!(with(&[("RANK", "0"), ("WORLD_SIZE", "1")], one_of_several), None);
        // A Slurm batch script of four tasks-to-be.
        assert_eq!(with(&[("SLURM_PROCID", "0"), ("SLURM_NTASKS", "4")], one_of_several), None);
        assert!(with(&[("SLURM_PROCID", "1"), ("SLURM_NTASKS", "4")], one_of_several).is_some());
    }
}
