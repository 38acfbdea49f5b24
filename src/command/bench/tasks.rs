//! `blipstream bench tasks`: what beams cost, what the filter costs beside the captioner, and what it saves that an image is
//! encoded once for both.

use std::io::{self, Write};
use std::sync::Arc;
use std::time::Instant;

use anyhow::Context;
use serde::Serialize;

use super::{ModelArgs, median};
use crate::caption::config::Architecture;
use crate::caption::{
    Ask, BeamSearch, BlipEngine, Encoders, Filter, Matcher, ModelInfo, Params, Pixels, Strategy, Viewer, load_matcher,
    number, pictures, tell,
};
use crate::command::{Exit, Usage, print_json, telemetry};
use crate::settings;

/// Beams of the paper.
const BEAMS: usize = 3;
/// What was found with each image.
const FOUND: &str = "a photo of two dogs that play with a red ball in the park";

/// Arguments of `bench tasks`.
#[derive(Debug, clap::Args)]
pub(super) struct TasksArgs {
    #[command(flatten)]
    model: ModelArgs,
    /// The filter: `random-base`, `random-large`, a folder, a hub id, or `demo`; else that of --model
    #[arg(long, value_name = "NAME|DIR|HUB-ID")]
    filter: Option<String>,
    /// Images at a time
    #[arg(long, value_delimiter = ',', value_name = "N,N", default_values_t = [1, 8])]
    batch: Vec<usize>,
    /// Tokens of every caption
    #[arg(long, default_value_t = 20, value_name = "N")]
    tokens: usize,
    /// How often each task is measured, in turns
    #[arg(long, default_value_t = 3, value_name = "N")]
    turns: usize,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
}

/// What is asked of every image of a batch.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
enum Task {
    /// A caption of the likeliest tokens.
    Greedy,
    /// The best of three beams.
    Beams,
    /// A text that was found is judged.
    Judge,
    /// A caption, which is judged with the text that was found; captioner and filter encode the image.
    FilterTwice,
    /// The same; the image is encoded once.
    FilterOnce,
    /// All three beams are judged with the text that was found; the image is encoded once.
    Candidates,
}

impl Task {
    const ALL: [Self; 6] =
        [Self::Greedy, Self::Beams, Self::Judge, Self::FilterTwice, Self::FilterOnce, Self::Candidates];

    fn name(self) -> &'static str {
        match self {
            Self::Greedy => "caption, greedy",
            Self::Beams => "caption, 3 beams",
            Self::Judge => "a text judged",
            Self::FilterTwice => "caption and filter, encoded twice",
            Self::FilterOnce => "caption and filter, encoded once",
            Self::Candidates => "3 candidates and filter, encoded once",
        }
    }

    fn ask(self, tokens: usize) -> Ask {
        let greedy = Params { max_new_tokens: tokens, min_new_tokens: tokens, ..Params::default() };
        let search = BeamSearch { beams: BEAMS, length_penalty: number(1.0) };
        let beams = |captions| Params { strategy: Strategy::Beam(search), captions, ..greedy.clone() };
        let caption = match self {
            Self::Greedy | Self::FilterTwice | Self::FilterOnce => Some(greedy.clone()),
            Self::Beams => Some(beams(1)),
            Self::Candidates => Some(beams(BEAMS)),
            Self::Judge => None,
        };
        let filter = !matches!(self, Self::Greedy | Self::Beams);
        let texts = if filter { vec![FOUND.into()] } else { Vec::new() };
        Ask { caption, texts, filter, ..Ask::default() }
    }
}

/// What is measured.
#[derive(Serialize)]
struct Report {
    model: ModelInfo,
    filter: ModelInfo,
    /// Whether both have the same image encoder; without that nothing is encoded once.
    shared: bool,
    version: &'static str,
    tokens: usize,
    turns: usize,
    batches: Vec<Batch>,
}

/// One batch size.
#[derive(Serialize)]
struct Batch {
    #[serde(rename = "batch")]
    size: usize,
    tasks: Vec<Measured>,
    /// Of the work of caption and filter: what need not be done again where the image encoder is shared. The median of the
    /// turns.
    shared_work: Option<f64>,
}

#[derive(Serialize)]
struct Measured {
    task: Task,
    /// The median of the turns.
    ms_an_image: f64,
    /// Images a second over those of the greedy caption, turn by turn.
    against_greedy: Vec<f64>,
}

struct Models {
    captioner: BlipEngine,
    /// With an image encoder of its own.
    apart: Arc<Matcher>,
    /// With the captioner's, where it is the same.
    beside: Arc<Matcher>,
    shared: bool,
}

/// Runs the command.
pub(super) fn run(args: &TasksArgs) -> anyhow::Result<Exit> {
    if args.batch.is_empty() || args.batch.contains(&0) || args.tokens == 0 || args.turns == 0 {
        return Err(Usage("--batch, --tokens and --turns are at least 1".into()).into());
    }
    telemetry::init(&telemetry::quiet(&settings::Log::default()))?;
    let (mut models, model, filter) = load(args)?;
    let mut report = Report {
        shared: models.shared,
        model,
        filter,
        version: env!("CARGO_PKG_VERSION"),
        tokens: args.tokens,
        turns: args.turns,
        batches: Vec::new(),
    };
    if !args.json {
        head(&report)?;
    }
    for &size in &args.batch {
        let batch = measure(&mut models, size, args)?;
        if !args.json {
            lines(&batch)?;
        }
        report.batches.push(batch);
    }
    if args.json {
        print_json(&report)?;
    }
    Ok(Exit::Done)
}

fn load(args: &TasksArgs) -> anyhow::Result<(Models, ModelInfo, ModelInfo)> {
    let captioner = args.model.options(&args.model.model, Architecture::Captioner)?;
    let name = args.filter.as_ref().unwrap_or(&args.model.model);
    let filter = args.model.options(name, Architecture::Matcher)?;
    let mut encoders = Encoders::default();
    let model = encoders.load_model(&captioner).with_context(|| format!("cannot load {}", args.model.model))?;
    let beside = encoders.load_matcher(&filter).with_context(|| format!("cannot load {name}"))?;
    let shared = model.encoder() == beside.encoder();
    let apart = if shared { load_matcher(&filter)? } else { beside.clone() };
    let (info, of_filter) = (model.info().clone(), apart.info().clone());
    Ok((Models { captioner: BlipEngine::new(model), apart, beside, shared }, info, of_filter))
}

/// Each task once a turn, every other turn backwards, so that none is always first.
fn measure(models: &mut Models, size: usize, args: &TasksArgs) -> anyhow::Result<Batch> {
    let side = models.apart.info().image_size;
    let images: Vec<Pixels> = (0..size as u64).map(|seed| pictures::pixels(side, seed)).collect::<Result<_, _>>()?;
    let once = |task: &Task| matches!(task, Task::FilterOnce | Task::Candidates);
    let mut tasks: Vec<Task> = Task::ALL.into_iter().filter(|task| models.shared || !once(task)).collect();
    let mut seconds: Vec<Vec<f64>> = vec![Vec::new(); Task::ALL.len()];
    for turn in 0..=args.turns {
        for task in &tasks {
            let filter = if once(task) { &mut models.beside } else { &mut models.apart };
            let items: Vec<_> = images.iter().map(|image| (image.clone(), task.ask(args.tokens))).collect();
            let begun = Instant::now();
            let told = tell(&mut models.captioner, Some(filter as &mut dyn Filter), None, &items)?;
            let took = begun.elapsed().as_secs_f64();
            told.into_iter().try_for_each(|told| told.map(drop)).context(task.name())?;
            // The first turn only warms up.
            if turn > 0 {
                seconds[*task as usize].push(took);
            }
        }
        tasks.reverse();
    }
    let ratios = |of: Task, to: Task| -> Vec<f64> {
        seconds[of as usize].iter().zip(&seconds[to as usize]).map(|(of, to)| to / of).collect()
    };
    let measured = Task::ALL.into_iter().filter(|task| !seconds[*task as usize].is_empty()).map(|task| Measured {
        task,
        ms_an_image: median(&seconds[task as usize]) * 1e3 / size as f64,
        against_greedy: ratios(task, Task::Greedy),
    });
    let saved: Vec<f64> = ratios(Task::FilterTwice, Task::FilterOnce).into_iter().map(|ratio| 1.0 - ratio).collect();
    let tasks = measured.collect();
    Ok(Batch { size, tasks, shared_work: (!saved.is_empty()).then(|| median(&saved)) })
}

fn head(report: &Report) -> io::Result<()> {
    let mut out = io::stdout().lock();
    let Report { model, filter, shared, .. } = report;
    writeln!(out, "{} and {} on {} in {} ({})", model.id, filter.id, model.device, model.dtype, model.backend)?;
    let encoders =
        if *shared { "the same image encoder" } else { "image encoders that differ: nothing is encoded once" };
    writeln!(out, "They have {encoders}. Captions of {} tokens.\n", report.tokens)?;
    writeln!(out, "images   ms an image   against greedy, turn by turn   task")
}

fn lines(batch: &Batch) -> io::Result<()> {
    let mut out = io::stdout().lock();
    for Measured { task, ms_an_image, against_greedy } in &batch.tasks {
        let ratios: Vec<_> = against_greedy.iter().map(|ratio| format!("{ratio:.2}")).collect();
        writeln!(out, "{:6} {ms_an_image:13.1}   {:28}   {}", batch.size, ratios.join("  "), task.name())?;
    }
    if let Some(shared) = batch.shared_work {
        writeln!(out, "{:6} {:.0} % of the work of caption and filter is shared\n", batch.size, shared * 100.0)?;
    }
    Ok(())
}
