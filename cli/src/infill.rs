//! `demask infill`: what is missing in a file. By a prompt of suffix, prefix, middle, or by filling open positions
//! where they are; or the tokens of a draft that the model doubts, anew.

use std::ops::{ControlFlow, Range};
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Instant;

use anyhow::{Context, Result, bail, ensure};
use clap::ValueEnum;
use demask_engine::decode::{
    self, Answer, Decoder, Event, FinishReason, Generation, Mode, Request, Room, score,
};
use demask_engine::model::tokenizer::{Fim, FimOrder};
use demask_engine::model::{DiffusionAttention, Llama, Tokenizer};
use demask_engine::tune;
use serde_json::{Value, json};

use crate::args::{Common, ModelArgs};
use crate::decoding::{DecodingArgs, mode_name, pass_rows};
use crate::generate::{Output, as_json, stream, summary};
use crate::patch::{ApplyArgs, Draft, Lines, Place};
use crate::steps::{Steps, StepsArgs};
use crate::tune::TuneArgs;
use crate::{interrupt, ui};

const EXAMPLES: &str = "\
Examples:
  demask infill main.py --at 12:5 --model DIR
  demask infill main.py --hole-marker '<HOLE>' --model DIR --apply
  demask infill main.py --hole-marker '<HOLE>' --model DIR --lengths 1,2,4,8
  demask infill draft.py --below 0.1 --model DIR | git apply
  cat main.py | demask infill - --at 3:1 --model DIR --json | jq -r .text

A model with fill-in-the-middle tokens is shown the text behind the hole, then the
text before it, and writes until it ends. One without, or with --lengths, fills
open positions inside the text: of these lengths the likeliest is taken, which is
judged by the hole and up to 32 tokens behind it. A model of blocks sees nothing
behind the block that it fills; only one of full attention sees both sides.

What fills the hole goes to stdout; of several holes, and with --below, a unified
diff that git apply takes.";

/// Tokens behind a hole by which its length is judged.
const JUDGED_BEHIND: usize = 32;
/// Lengths that are tried side by side.
const SIDE_BY_SIDE: usize = 8;

/// Fill holes in a file, or write anew what the model doubts
#[derive(clap::Args)]
#[command(after_help = EXAMPLES)]
#[command(
    override_usage = "demask infill [OPTIONS] --model <PATH> <--at …|--hole-marker …|--below …> <FILE>"
)]
#[command(group(clap::ArgGroup::new("where").required(true).args(["at", "hole_marker", "below"])))]
pub struct Args {
    /// The file, UTF-8; - is stdin
    #[arg(value_name = "FILE")]
    file: PathBuf,

    #[command(flatten)]
    model: ModelArgs,

    /// The hole is here: line and column from 1, the column counted in characters
    #[arg(long, value_name = "LINE:COLUMN")]
    at: Option<Place>,

    /// The holes are where this text stands
    #[arg(long, value_name = "TEXT")]
    hole_marker: Option<String>,

    /// The holes are the tokens whose probability is below this, given the blocks before
    #[arg(long, value_name = "P")]
    below: Option<f32>,

    /// With --below: only in these lines
    #[arg(long, value_name = "FIRST:LAST", conflicts_with_all = ["at", "hole_marker"])]
    lines: Option<Lines>,

    /// Fill open positions, as many as the likeliest of these numbers
    #[arg(long, value_name = "N,N,…", value_delimiter = ',', conflicts_with = "below")]
    lengths: Vec<usize>,

    /// What a prompt for a hole begins with
    #[arg(long, value_enum, default_value = "suffix")]
    fim_order: OrderArg,

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

/// [`FimOrder`] by name.
#[derive(Clone, Copy, ValueEnum)]
enum OrderArg {
    /// The text behind the hole: Seed-Coder, Stable-DiffCoder, models that demask trained
    Suffix,
    /// The text before the hole: Qwen2.5-Coder, StarCoder
    Prefix,
}

impl From<OrderArg> for FimOrder {
    fn from(order: OrderArg) -> FimOrder {
        match order {
            OrderArg::Suffix => FimOrder::SuffixFirst,
            OrderArg::Prefix => FimOrder::PrefixFirst,
        }
    }
}

/// What all ways to fill a hole work with.
struct Filling<'a> {
    args: &'a Args,
    llama: &'a Llama,
    tokenizer: &'a Tokenizer,
}

/// A filled hole.
struct Filled {
    text: String,
    generation: Generation,
    /// For JSON.
    more: Value,
}

pub fn run(args: Args) -> Result<ExitCode> {
    interrupt::listen("printing what there is");
    let model = args.model.open()?;
    let tokenizer = Tokenizer::for_model(&args.model.model, &model.config)?;
    let draft = args.apply.open(&args.file)?;
    let holes = args.holes(&draft.text)?;
    let mode = args.decoding.mode("infill", &model.config)?;
    let fim = tokenizer.fim().filter(|_| args.lengths.is_empty());
    if fim.is_none() || args.below.is_some() {
        ensure!(
            matches!(mode, Mode::Block(_)),
            "{}: filling open positions takes a model of block diffusion; {}",
            args.model.model.display(),
            match tokenizer.fim() {
                Some(_) => "this one fills holes by prompt, without --lengths and --below",
                None => "this one has no fill-in-the-middle tokens either",
            }
        );
    }
    let gpu = args.common.open_gpu_for(&args.model)?;
    let llama = model.load(&gpu, args.common.notices())?;
    let options = args.decoding.options("infill", &model.config, 0)?;
    let products = tune::products(&llama, &[1, pass_rows(&options), 512], false);
    args.tune.recall(&gpu, &products, args.common.notices())?;

    let filling = Filling { args: &args, llama: &llama, tokenizer: &tokenizer };
    if args.below.is_some() {
        return filling.refine(&draft, &mode);
    }
    let mut after = String::new();
    let mut filled = Vec::new();
    let alone = holes.len() == 1;
    let mut stopped = false;
    for (i, hole) in holes.iter().enumerate() {
        // The text so far, with what was filled, and the text to come, without the marks of other holes.
        after += &draft.text[if i == 0 { 0 } else { holes[i - 1].end }..hole.start];
        let mut behind = String::new();
        for (at, other) in holes.iter().enumerate().skip(i) {
            let end = holes.get(at + 1).map_or(draft.text.len(), |next| next.start);
            behind += &draft.text[other.end..end];
        }
        let one = match fim {
            Some(fim) => filling.by_prompt(fim, &after, &behind, alone)?,
            None => filling.in_place(&after, &behind, alone)?,
        };
        after += &one.text;
        stopped = one.generation.finish_reason == FinishReason::Interrupted;
        filled.push(one);
        // Asked once: what is left out and what is written must agree.
        stopped |= i + 1 < holes.len() && interrupt::asked();
        if stopped {
            after += &behind;
            break;
        }
    }
    if !stopped {
        after += &draft.text[holes.last().map_or(0, |hole| hole.end)..];
    }
    let notices = args.common.notices();
    let backup = match stopped {
        true => Value::Null,
        false => args.apply.settle(&draft, &after, notices)?,
    };
    if args.common.output.json {
        let mut all: Vec<Value> = Vec::new();
        for one in &filled {
            let mut answer = as_json(&tokenizer, &one.generation, mode_name(&mode));
            answer["text"] = json!(one.text);
            for (name, value) in one.more.as_object().into_iter().flatten() {
                answer[name] = value.clone();
            }
            all.push(answer);
        }
        let mut answer = match alone {
            true => all.remove(0),
            false => json!({ "holes": all }),
        };
        answer["after"] = json!(after);
        answer["diff"] = json!(draft.diff(&after));
        answer["backup"] = backup;
        ui::print_json(&answer)?;
    } else if !alone {
        ui::print(&draft.diff(&after))?;
    }
    for one in &filled {
        notices.say(&summary(&one.generation, mode_name(&mode)));
    }
    Ok(ExitCode::SUCCESS)
}

impl Args {
    /// What is to be replaced, in bytes and in order.
    fn holes(&self, text: &str) -> Result<Vec<Range<usize>>> {
        if let Some(at) = self.at {
            let at = at.offset(text)?;
            return Ok(Vec::from([Range { start: at, end: at }]));
        }
        let Some(marker) = &self.hole_marker else { return Ok(Vec::new()) };
        ensure!(!marker.is_empty(), "--hole-marker is empty");
        let holes: Vec<_> =
            text.match_indices(marker.as_str()).map(|(at, _)| at..at + marker.len()).collect();
        ensure!(!holes.is_empty(), "{}: {marker:?} does not occur in it", self.file.display());
        Ok(holes)
    }
}

impl Filling<'_> {
    /// The tokens nearest to a hole that leave room for what fills it: of the text behind at most as many as of the
    /// text before, unless that is short.
    fn near(&self, before: &str, behind: &str, room: usize) -> Result<[Vec<u32>; 2]> {
        let config = self.llama.config();
        let before = self.tokenizer.encode_text(before)?;
        let behind = self.tokenizer.encode_text(behind)?;
        let most = config.max_position_embeddings.checked_sub(room).filter(|&n| n > 0);
        let most = most.with_context(|| {
            format!(
                "the model has {} positions; lower --max-tokens",
                config.max_position_embeddings
            )
        })?;
        let (n_before, n_behind) = share(before.len(), behind.len(), most);
        if n_before + n_behind < before.len() + behind.len() {
            self.args.common.notices().say(&format!(
                "of {} tokens around the hole the model's context takes the nearest {}",
                before.len() + behind.len(),
                n_before + n_behind
            ));
        }
        Ok([before[before.len() - n_before..].to_vec(), behind[..n_behind].to_vec()])
    }

    /// Shows both sides, and lets the model write until it ends.
    fn by_prompt(&self, fim: Fim, before: &str, behind: &str, alone: bool) -> Result<Filled> {
        let (args, config) = (self.args, self.llama.config());
        let mut options = args.decoding.options("infill", config, 0)?;
        let [begin, _] = self.tokenizer.around()?;
        let names = 3 + begin.len();
        let room = (options.max_tokens + names).min(config.max_position_embeddings / 2);
        options.max_tokens = room.saturating_sub(names).max(1);
        let [prefix, suffix] = self.near(before, behind, room)?;
        let ids = [begin, fim.prompt(&prefix, &suffix, args.fim_order.into())].concat();
        // A model that begins another example has ended this one.
        for id in [fim.prefix, fim.suffix, fim.middle] {
            if !options.eos_ids.contains(&id) {
                options.eos_ids.push(id);
            }
        }
        let request = Request::answer(config, &ids, &options)?;
        let mut steps = args.steps.wanted().then(|| Steps::new(self.tokenizer, &request));
        let output = match alone {
            true => Output::of(args.common.output.json, false),
            false => Output::Nothing,
        };
        let generation =
            stream(self.llama, self.tokenizer, "", &ids, &options, output, steps.as_mut())?;
        let text = crate::show::answer_text(self.tokenizer, &ids, &generation.token_ids);
        let told = self.tell(steps.as_ref(), &generation, &options.mode)?;
        Ok(Filled { text, generation, more: json!({ "how": "prompt", "steps": told }) })
    }

    /// Fills as many open positions as the likeliest number asked for.
    fn in_place(&self, before: &str, behind: &str, alone: bool) -> Result<Filled> {
        let began = Instant::now();
        let args = self.args;
        let config = self.llama.config();
        let mut lengths = match args.lengths.is_empty() {
            true => vec![1, 2, 4, 8, 16, 32],
            false => args.lengths.clone(),
        };
        lengths.sort_unstable();
        lengths.dedup();
        ensure!(lengths[0] > 0, "--lengths: a hole of 0 tokens is none");
        let longest = lengths[lengths.len() - 1];
        let mut options = args.decoding.options("infill", config, 0)?;
        options.sampling.forbidden = std::mem::take(&mut options.eos_ids);
        let mode = options.mode.clone();
        let [begin, _] = self.tokenizer.around()?;
        let whole = self.tokenizer.encode_text(before)?.len();
        let [mut prefix, suffix] = self.near(before, behind, longest + begin.len())?;
        if prefix.len() == whole {
            prefix.splice(..0, begin);
        }
        let requests: Vec<Request> = lengths
            .iter()
            .map(|&n| {
                let tokens = [&prefix[..], &vec![0; n], &suffix].concat();
                let hole = prefix.len()..prefix.len() + n;
                let open = (0..tokens.len()).map(|at| hole.contains(&at)).collect();
                Request { tokens, open, options: options.clone() }
            })
            .collect();
        let answers = self.side_by_side(&requests)?;
        let mut best: Option<(f64, usize)> = None;
        let mut tried = Vec::new();
        for (i, (answer, events)) in answers.iter().enumerate() {
            if answer.finish_reason == FinishReason::Interrupted {
                break;
            }
            let likelihood = self.likelihood(answer, events, prefix.len(), lengths[i], &mode)?;
            tried.push(json!({ "length": lengths[i], "mean_logprob": likelihood }));
            if best.is_none_or(|(most, _)| likelihood > most) {
                best = Some((likelihood, i));
            }
        }
        let Some((_, best)) = best else { bail!("stopped before any length was filled") };
        let (answer, events) = &answers[best];
        let mut steps = Steps::new(self.tokenizer, &requests[best]);
        events.iter().for_each(|event| steps.hear(event));
        let hole = &answer.tokens[prefix.len()..prefix.len() + lengths[best]];
        let text = crate::show::answer_text(self.tokenizer, &prefix, hole);
        let generation = Generation {
            prompt_token_ids: prefix,
            token_ids: hole.to_vec(),
            forwards: answer.counters.forwards,
            tokens_per_forward: hole.len() as f32 / answer.counters.forwards.max(1) as f32,
            finish_reason: answer.finish_reason,
            seconds: began.elapsed().as_secs_f64(),
        };
        if alone && !args.common.output.json {
            ui::print(&text)?;
        }
        let told = self.tell(args.steps.wanted().then_some(&steps), &generation, &mode)?;
        let more = json!({ "how": "in_place", "lengths": tried, "steps": told });
        Ok(Filled { text, generation, more })
    }

    /// Runs requests together; each with its events.
    fn side_by_side(&self, requests: &[Request]) -> Result<Vec<(Answer, Vec<Event>)>> {
        let longest = requests.iter().map(|r| r.tokens.len()).max().unwrap_or(0);
        let sequences = requests.len().min(SIDE_BY_SIDE);
        let mut decoder = Decoder::new(self.llama, Room { tokens: longest * sequences, sequences });
        let ids = requests.iter().map(|r| decoder.submit(r.clone()));
        let ids = ids.collect::<demask_engine::Result<Vec<_>>>()?;
        let mut events = Vec::new();
        while !decoder.is_idle() && !interrupt::asked() {
            decoder.advance(&mut events)?;
        }
        let answer = |id| {
            let answer = decoder.take(id).expect("it was submitted here, and never taken");
            let own = events.iter().filter(|(whose, _)| *whose == id);
            (answer, own.map(|(_, event)| event.clone()).collect())
        };
        Ok(ids.into_iter().map(answer).collect())
    }

    /// Mean log-probability of a filled hole and of what stands behind it.
    fn likelihood(
        &self,
        answer: &Answer,
        events: &[Event],
        start: usize,
        length: usize,
        mode: &Mode,
    ) -> Result<f64> {
        let full = matches!(mode, Mode::Block(b) if b.attention == DiffusionAttention::Full);
        let scores: Vec<f64> = if full {
            // Each commit saw both sides.
            let commits = events.iter().filter_map(|event| match *event {
                Event::Committed { confidence, .. } => Some(f64::from(confidence).ln()),
                _ => None,
            });
            commits.collect()
        } else {
            let end = (start + length + JUDGED_BEHIND).min(answer.tokens.len());
            let scores = score(self.llama, &answer.tokens[..end], mode)?;
            scores[start..].iter().flatten().map(|&s| f64::from(s)).collect()
        };
        Ok(scores.iter().sum::<f64>() / scores.len().max(1) as f64)
    }

    /// Writes anew what the model doubts.
    fn refine(&self, draft: &Draft, mode: &Mode) -> Result<ExitCode> {
        let args = self.args;
        let (tokenizer, config) = (self.tokenizer, self.llama.config());
        let below = args.below.expect("it was asked for");
        let mut options = args.decoding.options("infill", config, 0)?;
        options.sampling.forbidden = std::mem::take(&mut options.eos_ids);
        let tokens = tokenizer.encode_text(&draft.text)?;
        let [begin, _] = tokenizer.around()?;
        let whole = [&begin[..], &tokens].concat();
        let logprobs = score(self.llama, &whole, mode)?.split_off(begin.len());
        let lines = match &args.lines {
            Some(lines) => lines.offsets(&draft.text)?,
            None => 0..draft.text.len(),
        };
        let mut at = 0;
        let mut open = Vec::with_capacity(tokens.len());
        for (&token, logprob) in tokens.iter().zip(&logprobs) {
            let doubted = logprob.is_some_and(|p| p.exp() < below);
            open.push(doubted && lines.contains(&at));
            at += tokenizer.token_bytes(token).map_or(0, <[u8]>::len);
        }
        let n = open.iter().filter(|&&open| open).count();
        open.splice(..0, begin.iter().map(|_| false));
        let request = Request { tokens: whole, open, options };
        let mut steps = Steps::new(tokenizer, &request);
        let began = Instant::now();
        let answer = decode::fill(self.llama, request, |event| {
            steps.hear(event);
            match interrupt::asked() {
                true => ControlFlow::Break(()),
                false => ControlFlow::Continue(()),
            }
        })?;
        // What stayed open keeps its token.
        let kept = answer.tokens.iter().zip(&answer.open).skip(begin.len()).zip(&tokens);
        let ids: Vec<u32> =
            kept.map(|((&new, &open), &old)| if open { old } else { new }).collect();
        let after = tokenizer.decode(&ids, false);
        let changed = ids.iter().zip(&tokens).filter(|(a, b)| a != b).count();
        let notices = args.common.notices();
        let told = args.steps.wanted().then(|| args.steps.tell(&steps, &self.facts(""), notices));
        let backup = match answer.finish_reason {
            FinishReason::Interrupted => Value::Null,
            _ => args.apply.settle(draft, &after, notices)?,
        };
        let diff = draft.diff(&after);
        match args.common.output.json {
            true => ui::print_json(&json!({
                "how": "refine",
                "tokens": tokens.len(),
                "hidden": n,
                "changed": changed,
                "forwards": answer.counters.forwards,
                "seconds": began.elapsed().as_secs_f64(),
                "mode": mode_name(mode),
                "after": after,
                "diff": diff,
                "backup": backup,
                "steps": told.transpose()?.flatten(),
            }))?,
            false => ui::print(&diff)?,
        }
        notices.say(&format!(
            "{n} of {} tokens were below {below}; {changed} are others now ({} passes)",
            tokens.len(),
            answer.counters.forwards
        ));
        Ok(ExitCode::SUCCESS)
    }

    fn tell(&self, steps: Option<&Steps>, generation: &Generation, mode: &Mode) -> Result<Value> {
        let Some(steps) = steps else { return Ok(Value::Null) };
        let facts = self.facts(&summary(generation, mode_name(mode)));
        let told = self.args.steps.tell(steps, &facts, self.args.common.notices())?;
        Ok(told.unwrap_or_default())
    }

    /// What stands below the title of a trace.
    fn facts(&self, summary: &str) -> Vec<String> {
        let model = self.args.model.model.display().to_string();
        let facts = [model, self.llama.gpu().adapter().describe(), summary.to_owned()];
        facts.into_iter().filter(|fact| !fact.is_empty()).collect()
    }
}

/// How many of `before` and `behind` tokens are taken if there is room for `most`.
fn share(before: usize, behind: usize, most: usize) -> (usize, usize) {
    let n_behind = behind.min((most / 2).max(most.saturating_sub(before)));
    (before.min(most - n_behind), n_behind)
}

#[cfg(test)]
mod tests {
    use super::share;

    #[test]
    fn room_is_shared_by_both_sides() {
        assert_eq!(share(10, 20, 100), (10, 20));
        assert_eq!(share(100, 100, 100), (50, 50));
        assert_eq!(share(100, 10, 100), (90, 10));
        assert_eq!(share(10, 100, 100), (10, 90));
    }
}
