// ---------------------------------------------------------------- tokens, next tokens, the selected token

const idOf = c => view().token_ids[c] < 0 ? 'several tokens' : `id ${view().token_ids[c]}`;

function tellToken(c) {
  const t = current();
  const where = c === t.position ? '\nthe target is predicted after this token' : c > t.position ? '\nafter the target' : '';
  const part = view().prompt_length < count() ? (c < view().prompt_length ? ', prompt' : ', answer') : '';
  return `${quoted(view().tokens[c])}\nposition ${c}, ${idOf(c)}${part}\nrelevance ${fmt(t.tokens[c])}${where}`;
}

function tokenNode(c, scale) {
  const t = current(), token = view().tokens[c];
  const kind = c === t.position ? 'tok at' : c > t.position ? 'tok later' : 'tok';
  return el('span', {class: kind, role: 'option', id: `tok-${c}`, 'data-token': c, style: paint(t.tokens[c], scale),
    'aria-label': tellToken(c).replace(/\n/g, ', '), 'aria-selected': String(c === state.token),
    tabindex: c === state.token ? 0 : -1}, visible(token));
}

// Lines break at spaces only, within nothing that a line can hold.
function renderTokens() {
  const scale = largest([current().tokens]), nodes = [], tokens = view().tokens;
  const breaks = c => c === 0 || c === view().prompt_length || /\s$/.test(tokens[c - 1]) || /^\s/.test(tokens[c]);
  let word = null, length = 0;
  legend('legend-tokens', scale);
  tokens.forEach((token, c) => {
    if (c === view().prompt_length) nodes.push(el('span', {class: 'boundary', title: 'the prompt ends here'}, 'answer'), el('wbr'));
    if (breaks(c)) { word = el('span', {class: 'word'}); length = 0; nodes.push(word); }
    word.append(tokenNode(c, scale));
    if ((length += token.length) > 24) word.className = 'word long';
    for (const _ of token.matchAll(/\n/g)) nodes.push(el('br'));
    if (!token.endsWith('\n') && (c + 1 === count() || breaks(c + 1))) nodes.push(el('wbr'));
  });
  const after = beyond();
  if (after.length && view().prompt_length === count()) nodes.push(el('span', {class: 'boundary', title: 'the prompt ends here'}, 'answer'));
  for (const n of after.slice(0, 3)) {
    nodes.push(el('span', {class: 'word'}, el('button', {type: 'button', class: 'ghost', onclick: () => selectTarget(n),
      title: 'predicted, and not read: it has no relevance of its own'}, visible(data.targets[n].label))), el('wbr'));
  }
  fill(byId('tokens'), ...nodes);
}

function listenTokens() {
  const box = byId('tokens');
  const index = e => { const node = e.target.closest('[data-token]'); return node ? Number(node.dataset.token) : null; };
  box.addEventListener('click', e => { const c = index(e); if (c !== null) { selectToken(c); byId(`tok-${c}`).focus(); } });
  box.addEventListener('mousemove', e => { const c = index(e); if (c === null) hideTip(); else showTip(tellToken(c), e.clientX, e.clientY); });
  box.addEventListener('mouseleave', hideTip);
  box.addEventListener('focusout', hideTip);
  box.addEventListener('keydown', e => {
    const to = {ArrowRight: state.token + 1, ArrowLeft: state.token - 1, Home: 0, End: count() - 1}[e.key];
    if (e.key === 'Escape') hideTip();
    if (to === undefined) return;
    e.preventDefault();
    selectToken(Math.max(0, Math.min(count() - 1, to)));
    const node = byId(`tok-${state.token}`), rect = node.getBoundingClientRect();
    node.focus();
    showTip(tellToken(state.token), rect.left, rect.bottom - 12);
  });
}

function renderCandidates() {
  const t = current();
  byId('candidates-note').textContent = `The model's most likely tokens after ${state.words ? 'word' : 'token'} ${t.position}.`;
  fill(byId('candidates'), ...t.candidates.map(c => el('li', {title: `id ${c.id}, logit ${fmt(c.logit, false)}, probability ${percent(c.probability || 0)}`},
    el('i', {style: {width: percent(c.probability || 0)}}),
    el('span', {}, el('span', {class: 'mono'}, quoted(c.token)), el('small', {}, `id ${c.id}`)),
    el('span', {class: 'num'}, percent(c.probability || 0), el('small', {}, fmt(c.logit, false))))));
}

function slotCell(l, c, k) {
  const expert = view().expert_ids[l][c][k], weight = fmt(view().expert_weights[l][c][k], false);
  if (expert < 0) return el('td', {class: 'slot'}, el('small', {}, data.counts[l].some(n => n) ? '' : 'dense'));
  const value = current().experts[l][c][k];
  return el('td', {class: 'slot', style: paint(value, largest(current().experts.map(layer => layer[c]))),
    title: `layer ${l}, expert ${expert}: weight ${weight}, relevance ${fmt(value)}`},
  el('b', {}, `E${expert} `), el('span', {class: 'num'}, fmt(value)), el('small', {}, `weight ${weight}`));
}

function renderToken() {
  const t = current(), c = state.token, {expert_ids: ids} = view();
  const head = [el('div', {class: 'target-line'}, el('strong', {id: 'token-name'}, quoted(view().tokens[c])),
    el('span', {}, `position ${c}, ${idOf(c)}`), el('span', {}, 'relevance ', el('b', {class: 'num'}, fmt(t.tokens[c]))))];
  byId('legend-token').hidden = !t.experts;
  if (!t.experts) {
    fill(byId('token'), ...head, el('p', {class: 'note'}, 'The slots of so many tokens and targets make no page; rel.experts and rel.to_frame("experts") have them.'));
    return;
  }
  legend('legend-token', largest(t.experts.map(layer => layer[c])));
  // a word may have as many experts in one layer as its tokens have slots, and few in another
  const slots = ids.reduce((n, layer) => Math.max(n, layer[c].filter(e => e >= 0).length), 0) || Math.min(1, data.slots);
  const columns = el('tr', {}, el('th', {scope: 'col'}, 'layer'), el('th', {scope: 'col'}, 'stream entering'),
    ...Array.from({length: slots}, (_, k) => el('th', {scope: 'col', class: 'left'}, state.words ? `expert #${k + 1}` : `slot ${k}`)));
  const rows = ids.map((layer, l) => el('tr', {}, el('th', {scope: 'row'}, String(l)),
    el('td', {class: 'num'}, fmt(t.layers[l][c])), ...Array.from({length: slots}, (_, k) => slotCell(l, c, k))));
  fill(byId('token'), ...head, table('Experts of the selected token, by layer', false, el('thead', {}, columns), el('tbody', {}, ...rows)));
}
