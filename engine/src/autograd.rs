//! Reverse-mode differentiation: a graph walker that names no op. An op hands its derivative to the tape as a
//! closure, so no central table can forget a rule.
//!
//! Rules, stated once: the cotangents of a tensor used twice are added; gradients of leaves are added up in
//! [`Gradients`] across calls of [`backward`]; a closure runs once and drops what it kept. Nothing is
//! recorded where no input is tracked. An op that can add to a gradient while it computes may do so
//! ([`Tensor::record_onto`]), which saves a pass over a weight's memory.

use std::cell::{Cell, RefCell};
use std::collections::{BTreeMap, HashMap};
use std::rc::Rc;

use bytemuck::{Pod, Zeroable};

use crate::gpu::{Kernel, fold, kernel};
use crate::tensor::Tensor;

const ADD_GRADIENTS: Kernel = kernel!("add_gradients");

/// Where a tensor comes from, as far as gradients care.
#[derive(Clone)]
pub(crate) enum Origin {
    /// No gradient flows here.
    Constant,
    /// A trainable leaf.
    Leaf(u64),
    /// The output of a recorded op.
    Node(Rc<Node>),
}

type Rule = Box<dyn FnOnce(&Tensor, &mut Gradients, Totals<'_>) -> Vec<Option<Gradient>>>;

/// What a derivative says of one input.
pub enum Gradient {
    /// A tensor that others may hold as well.
    Shared(Tensor),
    /// A tensor made for this; what comes later may be added to it in place.
    Own(Tensor),
    /// Nothing more: it was added to the input's total.
    Added,
}

/// For each input of an op, the gradient collected so far if more can be added to it in place.
pub type Totals<'a> = &'a [Option<Tensor>];

/// A gradient as far as it is collected.
struct Total {
    tensor: Tensor,
    /// No one else holds the tensor, so it can be added to in place.
    own: bool,
}

/// One recorded op: its inputs' origins and its derivative.
pub(crate) struct Node {
    /// Creation order; a node is always younger than its inputs.
    order: u64,
    op: &'static str,
    inputs: Vec<Origin>,
    backward: RefCell<Option<Rule>>,
}

thread_local! {
    static NEXT_ORDER: Cell<u64> = const { Cell::new(0) };
    static RECORDING: Cell<bool> = const { Cell::new(true) };
}

/// Gradients of leaves, added up over every [`backward`] they were given to.
#[derive(Default)]
pub struct Gradients {
    leaves: HashMap<u64, Total>,
}

impl Gradients {
    /// No gradients yet.
    pub fn new() -> Self {
        Self::default()
    }

    /// The gradient of a trainable leaf; `None` if nothing flowed into it. A later [`backward`] may add to it in place.
    pub fn get(&self, leaf: &Tensor) -> Option<&Tensor> {
        self.leaves.get(&leaf.leaf_id()?).map(|total| &total.tensor)
    }
}

impl Total {
    /// `before` and what a derivative gave.
    fn add(before: Option<Total>, gradient: Gradient) -> Total {
        match (before, gradient) {
            (Some(before), Gradient::Shared(new) | Gradient::Own(new)) => {
                Total { tensor: sum(&before.tensor, &new), own: true }
            }
            (None, Gradient::Shared(new)) => Total { tensor: new.detach(), own: false },
            (None, Gradient::Own(new)) => Total { tensor: new.detach(), own: true },
            (Some(before), Gradient::Added) => before,
            (None, Gradient::Added) => unreachable!("only a total is added to"),
        }
    }
}

impl Tensor {
    /// Gives this freshly computed tensor its derivative: a closure from the output's cotangent to one
    /// gradient per input, in order (`None` where the input is not tracked).
    pub fn record(
        &self,
        op: &'static str,
        inputs: &[&Tensor],
        backward: impl FnOnce(&Tensor) -> Vec<Option<Tensor>> + 'static,
    ) -> Tensor {
        self.record_onto(op, inputs, move |dy, _| {
            backward(dy).into_iter().map(|gradient| gradient.map(Gradient::Shared)).collect()
        })
    }

    /// As [`Tensor::record`], for a derivative that can add to what is collected already, or makes tensors of its own
    /// to which later ones can be added.
    pub fn record_onto(
        &self,
        op: &'static str,
        inputs: &[&Tensor],
        backward: impl FnOnce(&Tensor, Totals<'_>) -> Vec<Option<Gradient>> + 'static,
    ) -> Tensor {
        if !RECORDING.get() || !inputs.iter().any(|t| t.is_tracked()) {
            return self.clone();
        }
        self.attach(op, inputs, Box::new(move |dy, _, totals| backward(dy, totals)))
    }

    /// Says that this output of `op` has no derivative: `backward` through it panics instead of silently
    /// losing a gradient.
    pub fn record_none(&self, op: &'static str, inputs: &[&Tensor]) -> Tensor {
        self.record(op, inputs, move |_| panic!("{op} has no derivative"))
    }

    fn attach(&self, op: &'static str, inputs: &[&Tensor], backward: Rule) -> Tensor {
        let order = NEXT_ORDER.replace(NEXT_ORDER.get() + 1);
        let inputs = inputs.iter().map(|t| t.origin()).collect();
        self.with_node(Rc::new(Node { order, op, inputs, backward: RefCell::new(Some(backward)) }))
    }
}

/// Adds ∂(Σ output ⊙ cotangent)/∂leaf for every trainable leaf to `gradients`. Consumes the graph.
///
/// # Panics
/// If `output` is not tracked, the shapes differ, or the graph was walked before.
#[track_caller]
pub fn backward(output: &Tensor, cotangent: &Tensor, gradients: &mut Gradients) {
    assert_eq!(output.shape(), cotangent.shape(), "backward: output and cotangent");
    assert!(output.is_tracked(), "backward: no gradient flows into {output:?}");
    // Youngest first: every use of a tensor is younger than the tensor, so its cotangent is complete.
    let mut pending: Pending = BTreeMap::new();
    send(output.origin(), Gradient::Shared(cotangent.detach()), &mut pending, gradients);
    while let Some((_, (node, dy))) = pending.pop_last() {
        let rule = node.backward.borrow_mut().take();
        let rule = rule.unwrap_or_else(|| panic!("{}: backward walked this graph before", node.op));
        let total = |input: &Origin| {
            let total = match input {
                Origin::Constant => None,
                Origin::Leaf(id) => gradients.leaves.get(id),
                Origin::Node(node) => pending.get(&node.order).map(|(_, total)| total),
            };
            total.filter(|total| total.own).map(|total| total.tensor.clone())
        };
        let totals: Vec<_> = node.inputs.iter().map(total).collect();
        let grads = without_recording(|| rule(&dy.tensor, gradients, &totals));
        assert_eq!(grads.len(), node.inputs.len(), "{}: one gradient per input", node.op);
        for (input, grad) in node.inputs.iter().zip(grads) {
            match (input, grad) {
                (Origin::Constant, _) => {}
                (_, Some(grad)) => send(input.clone(), grad, &mut pending, gradients),
                (_, None) => panic!("{}: no gradient for a tracked input", node.op),
            }
        }
    }
}

/// Nodes that a cotangent has reached, by age.
type Pending = BTreeMap<u64, (Rc<Node>, Total)>;

fn send(to: Origin, grad: Gradient, pending: &mut Pending, gradients: &mut Gradients) {
    match to {
        Origin::Constant => {}
        Origin::Leaf(id) => {
            let before = gradients.leaves.remove(&id);
            gradients.leaves.insert(id, Total::add(before, grad));
        }
        Origin::Node(node) => {
            let before = pending.remove(&node.order).map(|(_, before)| before);
            pending.insert(node.order, (node, Total::add(before, grad)));
        }
    }
}

/// Runs `f` without recording anything, for inference with trainable weights.
pub fn without_recording<R>(f: impl FnOnce() -> R) -> R {
    struct Restore(bool);
    impl Drop for Restore {
        fn drop(&mut self) {
            RECORDING.set(self.0);
        }
    }
    let _restore = Restore(RECORDING.replace(false));
    f()
}

/// Activation checkpointing: runs `f` keeping only its input, and runs it again when gradients are needed.
/// Leaves that `f` uses beside `x` get their gradients as if it had been recorded.
pub fn checkpoint(x: &Tensor, f: impl Fn(&Tensor) -> Tensor + 'static) -> Tensor {
    if !RECORDING.get() {
        return f(x);
    }
    let y = without_recording(|| f(x));
    let kept = x.detach();
    // Tracked whatever `x` is: the leaves inside `f` are not known here.
    let rule: Rule = Box::new(move |dy, gradients, _| {
        let again = kept.trainable();
        let was = RECORDING.replace(true);
        let y = f(&again);
        if y.is_tracked() {
            backward(&y, dy, gradients);
        }
        RECORDING.set(was);
        let dx = again.leaf_id().and_then(|id| gradients.leaves.remove(&id));
        let none = || Tensor::zeros(kept.gpu(), kept.shape(), kept.dtype(), "checkpoint");
        vec![Some(Gradient::Shared(dx.map_or_else(none, |total| total.tensor)))]
    });
    y.attach("checkpoint", &[x], rule)
}

#[repr(C)]
#[derive(Clone, Copy, Pod, Zeroable)]
struct Params {
    n: u32,
}

fn sum(a: &Tensor, b: &Tensor) -> Tensor {
    assert_eq!(a.shape(), b.shape(), "gradients of one tensor");
    let y = a.empty_like("add_gradients");
    let n = a.numel();
    ADD_GRADIENTS.run(&Params { n: n as u32 }, &[a, b], &[&y], fold(n.div_ceil(256)));
    y
}
