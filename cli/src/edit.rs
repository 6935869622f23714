//! `demask edit`: a file changed as an instruction asks. The model is asked in the words it was fine-tuned with, and
//! answers with the whole changed text, or with some of its lines while the others stay as they are.

use std::ops::{ControlFlow, Range};
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Instant;

use anyhow::{Context, Result, ensure};
use demask_engine::decode::{self, DecodeOptions, Event, FinishReason, Request, score};
use demask_engine::model::{Llama, Tokenizer};
use demask_engine::tune;
use demask_trainer::data::conversation::edit_request;
use serde_json::{Value, json};

use crate::args::{Common, ModelArgs};
use crate::chat::{ChatArgs, user_message};
use crate::decoding::{DecodingArgs, endless, mode_name, pass_rows};
use crate::patch::{ApplyArgs, Lines};
use crate::show::Stream;
use crate::steps::{Steps, StepsArgs};
use crate::tune::TuneArgs;
use crate::{interrupt, ui};

const EXAMPLES: &str = "\
Examples:
  demask edit main.py --instruction 'add type hints' --model DIR
  demask edit main.py --instruction 'add type hints' --model DIR | git apply
  demask edit main.py --instruction 'handle empty lists' --lines 12:20 --model DIR --apply
  demask edit main.py --instruction 'rename x to count' --below 0.05 --model DIR

The change goes to stdout as a unified diff that git apply takes. The model needs a
chat template, and should have been fine-tuned on edits (demask train, a source of
format \"edit\"). With --lines it writes these lines anew, until it comes to the line
behind them. With --below it reads the file as its own answer first, and writes
those lines anew that hold a token it would hardly have written.";

/// Change a file as an instruction says, and print the change as a diff
#[derive(clap::Args)]
#[command(after_help = EXAMPLES)]
pub struct Args {
    /// The file, UTF-8; - is stdin
    #[arg(value_name = "FILE")]
    file: PathBuf,

    #[command(flatten)]
    model: ModelArgs,

    /// What is to be done
    #[arg(long, short, value_name = "TEXT")]
    instruction: String,

    /// Only these lines may change
    #[arg(long, value_name = "FIRST:LAST", conflicts_with = "below")]
    lines: Option<Lines>,

    /// Only lines may change that hold a token whose probability is below this
    #[arg(long, value_name = "P")]
    below: Option<f32>,

    #[command(flatten)]
    chat: ChatArgs,

    #[command(flatten)]
    apply: ApplyArgs,

    #[command(flatten)]
    decoding: DecodingArgs,

    #[command(flatten)]
    steps: StepsArgs,

    #[command(flatten)]
    tune: TuneArgs,

    #[command(flatten)]
    common: Common,
}

/// What it took.
#[derive(Default)]
struct Cost {
    tokens: usize,
    forwards: usize,
    /// The model ended by itself each time.
    whole: bool,
    steps: Vec<Value>,
}

struct Editor<'a> {
    args: &'a Args,
    llama: &'a Llama,
    tokenizer: &'a Tokenizer,
    options: DecodeOptions,
    /// The request, up to where the answer begins.
    prompt: Vec<u32>,
    cost: Cost,
}

pub fn run(args: Args) -> Result<ExitCode> {
    interrupt::listen("nothing is changed");
    let model = args.model.open()?;
    let path = args.model.model.display();
    let tokenizer = Tokenizer::for_model(&args.model.model, &model.config)?;
    let draft = args.apply.open(&args.file)?;
    let prompt =
        user_message(&tokenizer, &edit_request(&draft.text, &args.instruction), &args.chat)
            .with_context(|| path.to_string())?;
    let options = args.decoding.options("edit", &model.config, prompt.len())?;
    let gpu = args.common.open_gpu_for(&args.model)?;
    let notices = args.common.notices();
    if let Some(warning) = endless(&tokenizer, &model.config, true)? {
        notices.say(&warning);
    }
    let llama = model.load(&gpu, notices)?;
    let products = tune::products(&llama, &[1, pass_rows(&options), 512], false);
    args.tune.recall(&gpu, &products, notices)?;

    let began = Instant::now();
    let cost = Cost { whole: true, ..Cost::default() };
    let mut editor =
        Editor { args: &args, llama: &llama, tokenizer: &tokenizer, options, prompt, cost };
    let after = match (&args.lines, args.below) {
        (Some(lines), _) => editor.spans(&draft.text, vec![lines.offsets(&draft.text)?])?,
        (None, Some(below)) => {
            let spans = editor.doubted(&draft.text, below)?;
            editor.spans(&draft.text, spans)?
        }
        (None, None) => editor.whole(&draft.text)?,
    };
    let Editor { options, cost, .. } = editor;
    let seconds = began.elapsed().as_secs_f64();
    ensure!(
        cost.whole || !interrupt::asked(),
        "stopped before the answer was complete; nothing is changed"
    );
    ensure!(
        cost.whole,
        "the answer is not complete after {} tokens, so there is no change to show; raise --max-tokens",
        options.max_tokens
    );
    let backup = args.apply.settle(&draft, &after, notices)?;
    let diff = draft.diff(&after);
    match args.common.output.json {
        true => ui::print_json(&json!({
            "after": after,
            "diff": diff,
            "backup": backup,
            "tokens": cost.tokens,
            "forwards": cost.forwards,
            "seconds": seconds,
            "tokens_per_second": cost.tokens as f64 / seconds.max(1e-9),
            "mode": mode_name(&options.mode),
            "model": path.to_string(),
            "adapter": gpu.adapter().describe(),
            "steps": cost.steps,
        }))?,
        false => ui::print(&diff)?,
    }
    let changed = if diff.is_empty() { "; the model changes nothing" } else { "" };
    notices.say(&format!(
        "{} tokens in {}, {} per forward pass{changed}",
        cost.tokens,
        ui::duration(began.elapsed()),
        ui::count(cost.tokens as f64 / cost.forwards.max(1) as f64),
    ));
    Ok(ExitCode::SUCCESS)
}

impl Editor<'_> {
    /// The model's answer as the whole text.
    fn whole(&mut self, text: &str) -> Result<String> {
        let prompt = self.prompt.clone();
        let (answer, reason) = self.answer(&prompt, |_| false)?;
        self.cost.whole = reason == FinishReason::Eos;
        Ok(like(text, &unfenced(&answer, text)))
    }

    /// The lines that hold a token which the model would hardly have written in their place.
    fn doubted(&self, text: &str, below: f32) -> Result<Vec<Range<usize>>> {
        let ids = self.tokenizer.encode_text(text)?;
        let all = [&self.prompt[..], &ids].concat();
        let logprobs = score(self.llama, &all, &self.options.mode)?;
        let mut at = 0;
        let mut doubted = Vec::new();
        for (&id, logprob) in ids.iter().zip(&logprobs[self.prompt.len()..]) {
            let length = self.tokenizer.token_bytes(id).map_or(0, <[u8]>::len);
            if logprob.is_some_and(|p| p.exp() < below) {
                doubted.push(at..at + length);
            }
            at += length;
        }
        Ok(lines_of(text, &doubted))
    }

    /// Writes these parts of the text anew, each from the start of a line to the end of one, and keeps the rest.
    fn spans(&mut self, text: &str, spans: Vec<Range<usize>>) -> Result<String> {
        let (mut after, mut kept) = (String::new(), 0);
        for span in spans {
            after += &text[kept..span.start];
            kept = span.end;
            let rest = &text[span.end..];
            let prompt = [&self.prompt[..], &self.tokenizer.encode_text(&after)?].concat();
            let anchor = anchor(rest);
            let (answer, reason) =
                self.answer(&prompt, |answer| ends_before(answer, anchor).is_some())?;
            let answer = match ends_before(&answer, anchor) {
                Some(end) => &answer[..end],
                None => {
                    self.cost.whole &= reason == FinishReason::Eos;
                    &answer
                }
            };
            after += answer;
            if !rest.is_empty() && !answer.is_empty() && !answer.ends_with('\n') {
                after.push('\n');
            }
            if !self.cost.whole {
                break;
            }
        }
        Ok(after + &text[kept..])
    }

    /// What the model writes behind the prompt, until it ends or `enough` of it is there.
    fn answer(
        &mut self,
        prompt: &[u32],
        enough: impl Fn(&str) -> bool,
    ) -> Result<(String, FinishReason)> {
        let config = self.llama.config();
        let room = config.context_length().saturating_sub(prompt.len());
        let max_tokens = self.options.max_tokens.min(room);
        let options = DecodeOptions { max_tokens, ..self.options.clone() };
        let request = Request::answer(config, prompt, &options)?;
        let mut steps = Steps::new(self.tokenizer, &request);
        let mut stream = Stream::new(self.tokenizer, prompt, &options.eos_ids);
        let mut text = String::new();
        let bar = ui::share_bar(self.args.common.notices());
        let mut tokens = 0;
        let answer = decode::fill(self.llama, request, |event| {
            steps.hear(event);
            text += &stream.hear(event);
            if matches!(event, Event::Committed { .. }) {
                tokens += 1;
                bar.set_position((tokens * 1000 / max_tokens.max(1)) as u64);
            }
            match interrupt::asked() || enough(&text) {
                true => ControlFlow::Break(()),
                false => ControlFlow::Continue(()),
            }
        })?;
        bar.finish_and_clear();
        text += &stream.finish();
        self.cost.tokens += answer.counters.tokens;
        self.cost.forwards += answer.counters.forwards;
        if self.args.steps.wanted() {
            let facts = [
                self.args.model.model.display().to_string(),
                self.llama.gpu().adapter().describe(),
                format!("{} tokens in {} passes", tokens, answer.counters.forwards),
            ];
            let told = self.args.steps.tell(&steps, &facts, self.args.common.notices())?;
            self.cost.steps.extend(told);
        }
        Ok((text, answer.finish_reason))
    }
}

/// An answer without the fence that chat models put around code.
fn unfenced(answer: &str, before: &str) -> String {
    const FENCE: &str = "```";
    let fenced = answer.trim_start().starts_with(FENCE);
    if !fenced && (before.contains(FENCE) || !answer.contains(FENCE)) {
        return answer.to_owned();
    }
    let lines: Vec<&str> = answer.split_inclusive('\n').collect();
    let is_fence = |line: &&str| line.trim_start().starts_with(FENCE);
    let first = lines.iter().position(is_fence).unwrap_or(0);
    let last = match fenced {
        // A text with fences of its own ends at the last one.
        true => lines.iter().rposition(|line| line.trim() == FENCE),
        false => {
            lines[first + 1..].iter().position(|line| line.trim() == FENCE).map(|n| n + first + 1)
        }
    };
    let last = last.filter(|&last| last > first).unwrap_or(lines.len());
    lines[first + 1..last].concat()
}

/// The text with as many line ends behind it as the one it replaces.
fn like(before: &str, after: &str) -> String {
    let bare = after.trim_end_matches(['\n', '\r']);
    let ends = before.len() - before.trim_end_matches(['\n', '\r']).len();
    format!("{bare}{}", &before[before.len() - ends..])
}

/// The whole lines that ranges of a text touch, those next to each other as one.
fn lines_of(text: &str, touched: &[Range<usize>]) -> Vec<Range<usize>> {
    let mut spans: Vec<Range<usize>> = Vec::new();
    let mut start = 0;
    for line in text.split_inclusive('\n') {
        let end = start + line.len();
        if touched.iter().any(|t| t.start < end && t.end > start) {
            match spans.last_mut() {
                Some(last) if last.end == start => last.end = end,
                _ => spans.push(start..end),
            }
        }
        start = end;
    }
    spans
}

/// The lines behind a span up to the first that is not blank: where the model comes to them, it is done.
fn anchor(rest: &str) -> &str {
    let mut end = 0;
    for line in rest.split_inclusive('\n') {
        end += line.len();
        if !line.trim().is_empty() {
            break;
        }
    }
    rest[..end].trim_end_matches(['\n', '\r'])
}

/// Where the anchor begins in an answer: at the start of a line, and whole.
fn ends_before(answer: &str, anchor: &str) -> Option<usize> {
    if anchor.trim().is_empty() {
        return None;
    }
    let starts = answer.match_indices(anchor).map(|(at, _)| at);
    starts.into_iter().find(|&at| {
        let behind = &answer[at + anchor.len()..];
        (at == 0 || answer[..at].ends_with('\n')) && behind.starts_with(['\n', '\r'])
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fences_around_an_answer_go() {
        assert_eq!(unfenced("x = 1\n", "x = 0\n"), "x = 1\n");
        assert_eq!(unfenced("```python\nx = 1\n```\n", "x = 0\n"), "x = 1\n");
        assert_eq!(unfenced("Here it is:\n```\nx = 1\n```\nDone.", "x = 0\n"), "x = 1\n");
        assert_eq!(unfenced("```\nnot closed\n", ""), "not closed\n");
        let readme = "Run:\n```\nmake\n```\n";
        assert_eq!(unfenced(readme, readme), readme);
        assert_eq!(unfenced(&format!("```md\n{readme}```"), readme), readme);
    }

    #[test]
    fn the_end_of_a_file_stays_as_it_was() {
        assert_eq!(like("a\n", "b"), "b\n");
        assert_eq!(like("a", "b\n\n"), "b");
        assert_eq!(like("a\r\n", "b\n"), "b\r\n");
    }

    #[test]
    fn whole_lines_that_hold_a_range() {
        let text = "one\ntwo\nthree\nfour\n";
        assert_eq!(lines_of(text, &[1..2, 5..6, 15..16]), [0..8, 14..19]);
        assert_eq!(lines_of(text, &[3..4, 9..9]), [0..4, 8..14]);
        assert!(lines_of(text, &[]).is_empty());
    }

    #[test]
    fn a_span_ends_where_the_next_line_comes() {
        let anchor = anchor("\n    return x\n}\n");
        assert_eq!(anchor, "\n    return x");
        assert_eq!(ends_before("a\nb\n\n    return x\n", anchor), Some(4));
        assert_eq!(ends_before("a\nb\n\n    return x", anchor), None, "the line may go on");
        assert_eq!(ends_before("b    return x\n", "    return x"), None, "not at a line's start");
        assert_eq!(ends_before("    return x\n", "    return x"), Some(0));
        assert_eq!(ends_before("anything\n", super::anchor("")), None);
    }
}
