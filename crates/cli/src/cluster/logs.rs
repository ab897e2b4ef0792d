//! What was logged of a job or a backbone.

use anyhow::Result;
use clap::Args;
use incipit_proto::client::{Client, problem_of};
use incipit_proto::v1::{LogLine, StreamLogsRequest};
use tonic::{Code, Status};

use super::follow::Patience;
use super::names::short;
use super::show;
use crate::args::Global;
use crate::exit::Exit;
use crate::output;
use crate::progress::note;

/// Flags for logs.
#[derive(Args)]
pub(crate) struct LogsArgs {
    /// Go on as lines come, until nothing more can
    #[arg(short, long)]
    follow: bool,
    /// Lines of this rank alone
    #[arg(long, value_name = "N")]
    rank: Option<u32>,
}

/// Prints the lines of the job or backbone `name`; with `--follow` it goes on where it was when the connection breaks, until `ended` is true.
///
/// # Errors
/// What the coordinator says, or if it stays away.
pub(crate) async fn logs(
    args: &LogsArgs,
    name: &str,
    client: &Client,
    global: &Global,
    ended: impl AsyncFn() -> Result<bool>,
) -> Result<Exit> {
    let mut request =
        StreamLogsRequest { name: name.to_owned(), offset: 0, follow: args.follow, rank: args.rank };
    let (mut patience, mut known) = (Patience::default(), false);
    loop {
        match pages(client, &mut request, (&mut patience, &mut known), global).await? {
            // It was there, and is deleted.
            Some(status) if known && problem_of(&status).code == Code::NotFound => return Ok(Exit::Ok),
            Some(status) => patience.after(&status).await?,
            // A coordinator that is about to end ends its streams, too.
            None if !args.follow || ended().await? => return Ok(Exit::Ok),
            None => patience.after(&Status::unavailable("the coordinator ended the stream")).await?,
        }
    }
}

/// Prints what comes, and says why nothing more does; `known` becomes true where there is such a job or backbone.
async fn pages(
    client: &Client,
    request: &mut StreamLogsRequest,
    (patience, known): (&mut Patience, &mut bool),
    global: &Global,
) -> Result<Option<Status>> {
    let mut stream = match client.jobs().stream_logs(request.clone()).await {
        Ok(stream) => stream.into_inner(),
        Err(status) => return Ok(Some(status)),
    };
    *known = true;
    loop {
        match stream.message().await {
            Ok(Some(page)) => {
                patience.fine();
                let (from, to) = (request.offset, page.first_offset);
                if from < to {
                    note(&format!(
                        "lines {} to {to} were dropped: the coordinator keeps the newest ones, as limits.log_lines says",
                        from + 1
                    ));
                }
                for line in &page.lines {
                    if global.json { show::json_line(line)? } else { output::line(&text(line))? }
                }
                request.offset = page.next_offset.max(request.offset);
            }
            Ok(None) => return Ok(None),
            Err(status) => return Ok(Some(status)),
        }
    }
}

fn text(line: &LogLine) -> String {
    let clock = line.time.as_ref().map_or_else(String::new, |time| {
        let second = time.seconds.rem_euclid(86_400);
        format!("{:02}:{:02}:{:02} ", second / 3600, second / 60 % 60, second % 60)
    });
    let from = if line.worker.is_empty() {
        "coordinator".to_owned()
    } else {
        format!("{}/{}", short(&line.worker), line.rank)
    };
    let level = if line.level.is_empty() { String::new() } else { format!("{:5} ", line.level) };
    format!("{clock}{from} {level}{}", line.text)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_tells_when_and_who() {
        let time = Some(pbjson_types::Timestamp { seconds: 86_400 + 3 * 3600 + 4 * 60 + 5, nanos: 0 });
        let (worker, level) = ("workers/w-1".to_owned(), "WARN".to_owned());
        let mut line = LogLine { time, worker, rank: 2, level, text: "slow".into(), ..LogLine::default() };
        assert_eq!(text(&line), "03:04:05 w-1/2 WARN  slow");
        (line.worker, line.level, line.time) = (String::new(), String::new(), None);
        assert_eq!(text(&line), "coordinator slow");
    }
}
