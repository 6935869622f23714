//! Reverse-mode differentiation: a graph walker that names no op. An op hands its derivative to the tape as a
//! closure, so no central table can forget a rule.
//!
//! Rules, stated once: the cotangents of a tensor used twice are added; gradients of leaves are added up in
//! [`Gradients`] across calls of [`backward`]; a closure runs once and drops what it kept. Nothing is
//! recorded where no input is tracked.

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

type Backward = Box<dyn FnOnce(&Tensor, &mut Gradients) -> Vec<Option<Tensor>>>;

/// One recorded op: its inputs' origins and its derivative.
pub(crate) struct Node {
    /// Creation order; a node is always younger than its inputs.
    order: u64,
    op: &'static str,
    inputs: Vec<Origin>,
    backward: RefCell<Option<Backward>>,
}

thread_local! {
    static NEXT_ORDER: Cell<u64> = const { Cell::new(0) };
    static RECORDING: Cell<bool> = const { Cell::new(true) };
}

/// Gradients of leaves, added up over every [`backward`] they were given to.
#[derive(Default)]
pub struct Gradients {
    leaves: HashMap<u64, Tensor>,
}

impl Gradients {
    /// No gradients yet.
    pub fn new() -> Self {
        Self::default()
    }

    /// The gradient of a trainable leaf; `None` if nothing flowed into it.
    pub fn get(&self, leaf: &Tensor) -> Option<&Tensor> {
        self.leaves.get(&leaf.leaf_id()?)
    }

    fn add(&mut self, leaf: u64, gradient: Tensor) {
        let total = match self.leaves.remove(&leaf) {
            Some(before) => sum(&before, &gradient),
            None => gradient.detach(),
        };
        self.leaves.insert(leaf, total);
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
        if !RECORDING.get() || !inputs.iter().any(|t| t.is_tracked()) {
            return self.clone();
        }
        self.attach(op, inputs, Box::new(move |dy, _| backward(dy)))
    }

    /// Says that this output of `op` has no derivative: `backward` through it panics instead of silently
    /// losing a gradient.
    pub fn record_none(&self, op: &'static str, inputs: &[&Tensor]) -> Tensor {
        self.record(op, inputs, move |_| panic!("{op} has no derivative"))
    }

    fn attach(&self, op: &'static str, inputs: &[&Tensor], backward: Backward) -> Tensor {
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
    let mut pending: BTreeMap<u64, (Rc<Node>, Tensor)> = BTreeMap::new();
    send(output.origin(), cotangent.detach(), &mut pending, gradients);
    while let Some((_, (node, dy))) = pending.pop_last() {
        let rule = node.backward.borrow_mut().take();
        let rule = rule.unwrap_or_else(|| panic!("{}: backward walked this graph before", node.op));
        let grads = without_recording(|| rule(&dy, gradients));
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

fn send(
    to: Origin,
    grad: Tensor,
    pending: &mut BTreeMap<u64, (Rc<Node>, Tensor)>,
    gradients: &mut Gradients,
) {
    match to {
        Origin::Constant => {}
        Origin::Leaf(id) => gradients.add(id, grad),
        Origin::Node(node) => {
            let total = match pending.remove(&node.order) {
                Some((_, before)) => sum(&before, &grad),
                None => grad,
            };
            pending.insert(node.order, (node, total));
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
    let rule: Backward = Box::new(move |dy, gradients| {
        let again = kept.trainable();
        let was = RECORDING.replace(true);
        let y = f(&again);
        if y.is_tracked() {
            backward(&y, dy, gradients);
        }
        RECORDING.set(was);
        let dx = again.leaf_id().and_then(|id| gradients.leaves.remove(&id));
        vec![Some(dx.unwrap_or_else(|| {
            Tensor::zeros(kept.gpu(), kept.shape(), kept.dtype(), "checkpoint")
        }))]
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
