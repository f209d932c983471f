/*
 * The verbs: each does its work and writes its result on stdout, with --json as one object whose
 * keys are a contract (README.md). 0 or -errno with fault_text(); on failure nothing was written
 * (chat apart, which talks).
 */
#pragma once

#include "engine.h"

int verb_tokenize(struct engine *engine);
int verb_logits(struct engine *engine);
int verb_perplexity(struct engine *engine);
int verb_complete(struct engine *engine);
int verb_ask(struct engine *engine);
int verb_compare(struct engine *engine);
int verb_chat(struct engine *engine);
