//! Look-ups, and the leases that come with them, which the protocol has no words for.
//!
//! A lease is taken by an `add` of a [placeholder](crate::value::Placeholder), which no two clients write
//! alike, and a `gets` of what is there then: if it is ours still, so is the lease, and the version that
//! was read is its token. What is loaded is written with that, and whoever has written or deleted the
//! key meanwhile has taken it away. So it takes three questions, one by one over one connection:
//!
//! ```text
//! gets k           -> a value, a placeholder: that is the answer. Nothing:
//! add k <lease>    -> STORED, or somebody has been faster
//! gets k           -> what is there is the answer
//! ```
//!
//! Each of them may come to nothing, and be executed all the same: a placeholder that is left behind
//! is nobody's, and others wait for it as for one whose owner has died. It is gone with its TTL.
//!
//! Through a proxy tokens are worth nothing, so there are no leases.

use std::time::Duration;

use crate::key::Key;
use crate::request::{LeaseTerms, Operation, StoreMode};
use crate::response::{Found, LeaseState, Lookup, Response};
use crate::ttl::Ttl;
use crate::value::{Placeholder, Value, is_placeholder};

/// What is known of who else uses a server.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Company {
    /// Everybody speaks the classic protocol with it.
    Classic,
    /// It knows the meta protocol, and others may speak that.
    Mixed,
    /// It is behind a proxy.
    Proxied,
}

/// One look-up, question by question.
#[derive(Debug)]
pub(super) struct Looking {
    question: Operation,
    step: Step,
    company: Company,
    key: Key,
    lease: Option<(LeaseTerms, Placeholder)>,
}

/// What follows from an answer.
#[derive(Debug)]
pub(super) enum Next {
    /// There is another [question](Looking::question).
    Question,
    /// This is the answer to the look-up.
    Answer(Response),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Step {
    Look,
    Take,
    LookAgain,
}

impl Looking {
    /// `None` if the operation is no look-up. Without room for a placeholder of so many bytes no
    /// lease is taken.
    pub(super) fn new(operation: &Operation, company: Company, max_value: usize) -> Option<Self> {
        let Operation::Lookup { key, lease } = operation else {
            return None;
        };
        let leases = company != Company::Proxied && Placeholder::LENGTH <= max_value;
        let lease = lease.filter(|_| leases);
        Some(Self {
            question: look(key),
            step: Step::Look,
            company,
            key: key.clone(),
            lease: lease.map(|terms| (terms, Placeholder::random())),
        })
    }

    /// What is to be asked now.
    pub(super) fn question(&self) -> &Operation {
        &self.question
    }

    /// What follows from the answer to that.
    pub(super) fn answered(&mut self, answer: &Response) -> Next {
        let lookup = match answer {
            Response::Found(lookup) => self.judge((**lookup).clone()),
            // It is there now, be it ours or somebody else's, who was faster.
            _ => {
                self.step = Step::LookAgain;
                self.question = look(&self.key);
                return Next::Question;
            }
        };
        match &self.lease {
            Some((terms, placeholder))
                if self.step == Step::Look
                    && lookup.found == Found::Nothing
                    && lookup.token.is_none() =>
            {
                self.step = Step::Take;
                self.question = take(&self.key, *terms, placeholder);
                Next::Question
            }
            _ => Next::Answer(Response::Found(Box::new(lookup))),
        }
    }

    /// What there is, and whose.
    fn judge(&self, lookup: Lookup) -> Lookup {
        let Lookup { found, token, .. } = lookup;
        let (found, lease) = match found {
            Found::Value { value, .. } if is_placeholder(value.flags(), &value) => {
                (Found::Nothing, self.whose(&value))
            }
            // It may be the placeholder of a lease in the meta protocol, or a value of no bytes. That
            // cannot be told, so it is nothing to be relied on; who replaces it needs its token.
            Found::Value { value, .. }
                if self.company == Company::Mixed && value.is_empty() && value.flags() == 0 =>
            {
                (Found::Unreadable, LeaseState::Free)
            }
            found => (found, LeaseState::Free),
        };
        let lease = match self.company {
            Company::Proxied => LeaseState::Unknown,
            Company::Classic | Company::Mixed => lease,
        };
        Lookup {
            untimed: true,
            ..Lookup::new(found, token, lease)
        }
    }

    fn whose(&self, value: &Value) -> LeaseState {
        match &self.lease {
            Some((_, placeholder)) if placeholder.is(value) => LeaseState::Won,
            _ => LeaseState::Taken,
        }
    }
}

fn look(key: &Key) -> Operation {
    let key = key.clone();
    Operation::Lookup { key, lease: None }
}

fn take(key: &Key, terms: LeaseTerms, placeholder: &Placeholder) -> Operation {
    Operation::Store {
        mode: StoreMode::Add,
        key: key.clone(),
        payload: placeholder.payload(),
        // One of no time would be over before it began.
        ttl: Ttl::from(terms.duration.max(Duration::from_secs(1))),
    }
}
