//! What each pass of a decoding did, kept for people: as lines on the terminal (`--explain-steps`), as JSON, or as a
//! page that replays it (`--trace`).

use std::collections::BTreeMap;
use std::ops::Range;
use std::path::PathBuf;

use anyhow::Result;
use clap::Args;
use demask_engine::decode::{Event, Request};
use demask_engine::model::Tokenizer;
use demask_trainer::disk::write_atomically;
use serde_json::{Value, json};

use crate::decoding::block_length;
use crate::show::{harmless, token_text};
use crate::ui::{self, Notices};

/// Where the steps of a decoding go.
#[derive(Args)]
pub struct StepsArgs {
    /// Print to stderr what each pass committed and what it would have put into the rest, with
    /// confidences; with --json, under "steps"
    #[arg(long)]
    explain_steps: bool,

    /// Write a page that replays the decoding pass by pass, of several the last; it loads nothing
    /// from elsewhere
    #[arg(long, value_name = "FILE")]
    trace: Option<PathBuf>,
}

/// The page, but for its data.
const PAGE: &str = include_str!("trace.html");

/// A position, its token and the token's confidence.
type Choice = (usize, u32, f32);

/// What one pass did.
struct Pass {
    /// The positions that are filled together, clipped to the text.
    block: Range<usize>,
    committed: Vec<Choice>,
    proposed: Vec<Choice>,
}

/// The passes of one request, from its events.
pub struct Steps<'a> {
    tokenizer: &'a Tokenizer,
    /// Given tokens; `None` where the request was open.
    given: Vec<Option<u32>>,
    block_length: usize,
    passes: BTreeMap<usize, Pass>,
    /// Proposals of the pass whose commits come next.
    proposed: Vec<Choice>,
}

impl StepsArgs {
    /// Whether anyone wants them.
    pub fn wanted(&self) -> bool {
        self.explain_steps || self.trace.is_some()
    }

    /// Writes and prints what was asked for; `facts` stand below the page's title. Returns what belongs into JSON.
    pub fn tell(&self, steps: &Steps, facts: &[String], notices: Notices) -> Result<Option<Value>> {
        if let Some(path) = &self.trace {
            write_atomically(path, steps.page(facts).as_bytes())?;
            notices.say(&format!("trace: {}", path.display()));
        }
        if self.explain_steps {
            notices.say(steps.table().trim_end());
        }
        Ok(self.explain_steps.then(|| steps.as_json()))
    }
}

impl<'a> Steps<'a> {
    /// Before the first pass over a request.
    pub fn new(tokenizer: &'a Tokenizer, request: &Request) -> Steps<'a> {
        let given = request.tokens.iter().zip(&request.open);
        Steps {
            tokenizer,
            given: given.map(|(&token, &open)| (!open).then_some(token)).collect(),
            block_length: block_length(&request.options.mode),
            passes: BTreeMap::new(),
            proposed: Vec::new(),
        }
    }

    /// Takes note of an event.
    pub fn hear(&mut self, event: &Event) {
        match *event {
            Event::Proposed { position, token, confidence } => {
                self.proposed.push((position, token, confidence));
            }
            Event::Committed { position, token, confidence, pass } => {
                let start = position / self.block_length * self.block_length;
                let block = start..(start + self.block_length).min(self.given.len());
                let proposed = std::mem::take(&mut self.proposed);
                let known = self.passes.entry(pass).or_insert(Pass {
                    block,
                    committed: Vec::new(),
                    proposed: Vec::new(),
                });
                known.proposed.extend(proposed);
                known.committed.push((position, token, confidence));
            }
            Event::Prefilled { .. } | Event::BlockDone { .. } | Event::Finished { .. } => {}
        }
    }

    fn text(&self, token: u32) -> String {
        token_text(self.tokenizer, token)
    }

    /// What stayed open in a pass.
    fn left(pass: &Pass) -> impl Iterator<Item = &Choice> {
        let committed = |at| pass.committed.iter().any(|c| c.0 == at);
        pass.proposed.iter().filter(move |p| !committed(p.0))
    }

    /// One line for each pass.
    fn table(&self) -> String {
        let choice = |&(at, token, confidence): &Choice| {
            let text = harmless(&self.text(token));
            format!("{at} {text:?} {:.1} %", 100.0 * confidence)
        };
        let mut text = String::new();
        for (number, pass) in &self.passes {
            let committed: Vec<String> = pass.committed.iter().map(choice).collect();
            let left: Vec<String> = Self::left(pass).map(choice).collect();
            text += &format!("pass {:>4}  {}", number + 1, committed.join("  "));
            if !left.is_empty() {
                text += &ui::dim_stderr(&format!("   open: {}", left.join("  ")));
            }
            text.push('\n');
        }
        text
    }

    fn as_json(&self) -> Value {
        let choice = |&(at, token, confidence): &Choice| {
            json!({
                "position": at,
                "token": token,
                "text": self.text(token),
                "confidence": confidence,
            })
        };
        let pass = |(number, pass): (&usize, &Pass)| {
            json!({
                "pass": number + 1,
                "committed": pass.committed.iter().map(choice).collect::<Vec<_>>(),
                "open": Self::left(pass).map(choice).collect::<Vec<_>>(),
            })
        };
        self.passes.iter().map(pass).collect()
    }

    fn page(&self, facts: &[String]) -> String {
        let choice = |&(at, token, confidence): &Choice| {
            let special = self.tokenizer.is_special(token);
            json!([at, if special { String::new() } else { self.text(token) }, confidence])
        };
        let all = |choices: &[Choice]| choices.iter().map(choice).collect::<Vec<_>>();
        let passes: Vec<Value> = self
            .passes
            .values()
            .map(|pass| {
                json!({
                    "block": [pass.block.start, pass.block.end],
                    "committed": all(&pass.committed),
                    "proposed": all(&pass.proposed),
                })
            })
            .collect();
        let first = self.given.iter().position(Option::is_none).unwrap_or(self.given.len());
        let data = json!({
            "facts": facts,
            "cells": self.given.iter().map(|t| t.map(|t| self.text(t))).collect::<Vec<_>>(),
            // Text behind the first open position: then all of them are drawn from the start.
            "holes": self.given[first..].iter().any(Option::is_some),
            "passes": passes,
        });
        // Inside a script element only this could end it.
        PAGE.replace("@DATA@", &data.to_string().replace("</", "<\\/"))
    }
}
