// ---------------------------------------------------------------- header: model, prompt and answer, buttons, targets

function pieces(from, to) {
  return data.tokens.slice(from, to).join('').split('\n').map(visible).join('↵\n').replace(/∅/g, '');
}

// Targets behind the last token: their text is no input, so no column stands for it.
const beyond = () => data.targets.map((t, n) => n).filter(n => data.targets[n].position === data.tokens.length - 1);

function renderHeader() {
  byId('model').textContent = visible(data.model);
  const split = data.prompt_length < data.tokens.length;
  const text = split ? pieces(0, data.prompt_length) : data.prompt.split('\n').map(visible).join('↵\n').replace(/∅/g, '');
  const long = words => el('dd', {class: 'prompt', tabindex: words.length > 400 ? 0 : null}, words);
  const answer = pieces(data.prompt_length);
  fill(byId('facts'), el('dt', {}, 'Rule'), el('dd', {}, visible(data.rule)), el('dt', {}, 'Prompt'), long(text),
    ...(split ? [el('dt', {}, 'Answer'), long(answer)] : []),
    el('dt', {}, 'Shape'), el('dd', {}, `${data.tokens.length} tokens${split ? ` (${data.prompt_length} of the prompt)` : ''}, ${L} layers, ` +
      (E ? `${E} experts, ${data.slots} routed per token` : 'all dense')));
  const last = byId('facts').querySelectorAll('dd.prompt')[1];
  if (last) for (const n of beyond()) last.append(el('span', {class: 'ghost'}, visible(data.targets[n].label)));
}

function renderButtons() {
  const again = change => () => { change(); renderButtons(); renderAll(); };
  const next = {system: 'light', light: 'dark', dark: 'system'};
  fill(byId('buttons'),
    ...(data.words ? [button('Merge words', state.words, () => { mergeWords(!state.words); renderButtons(); }, 'Sum the tokens of each word')] : []),
    button('Square-root colours', state.root, again(() => { state.root = !state.root; }), 'Show small values more clearly'),
    el('button', {type: 'button', title: 'Colours of the page', onclick: again(() => setTheme(next[state.theme]))}, `Theme: ${state.theme}`),
    el('span', {class: 'files'}, 'Download ', ...Object.entries(downloads).map(([name, save]) =>
      el('button', {type: 'button', onclick: save, title: downloadTitles[name]}, name))));
}

function setTheme(theme) {
  state.theme = theme;
  if (theme === 'system') delete document.documentElement.dataset.theme;
  else document.documentElement.dataset.theme = theme;
}

function tellTarget(n) {
  const t = entry(n), tokens = view().tokens;
  const best = t.tokens.map((x, c) => [c, x || 0]).sort((a, b) => Math.abs(b[1]) - Math.abs(a[1])).slice(0, 4).filter(([, x]) => x);
  return `${visible(t.label)}\nvalue ${fmt(t.value, false)}, predicted after ${quoted(tokens[t.position])} at ${t.position}\n` +
    best.map(([c, x]) => `${fmt(x)}  ${quoted(tokens[c])} at ${c}`).join('\n');
}

function renderTargets() {
  byId('targets').hidden = N < 2;
  byId('matrix-card').hidden = N < 2;
  fill(byId('targets'), ...data.targets.map((t, n) => el('button', {type: 'button', 'data-target': n, 'aria-pressed': 'false',
    onclick: () => selectTarget(n),
    onmousemove: e => { maps.matrix.point(n); showTip(tellTarget(n), e.clientX, e.clientY); },
    onmouseleave: () => { maps.matrix.point(null); hideTip(); }},
  el('span', {class: 'mono'}, visible(t.label)), el('small', {}, `after ${t.position}`))));
}

function renderTarget() {
  const t = current();
  fill(byId('target'),
    el('div', {class: 'target-line'}, el('strong', {}, visible(t.label)),
      el('span', {}, 'value ', el('b', {class: 'num'}, fmt(t.value, false))),
      el('span', {}, `predicted after ${state.words ? 'word' : 'token'} ${t.position}, `, el('span', {class: 'mono'}, quoted(view().tokens[t.position])))),
    el('p', {class: 'line', id: 'ledger-line'}, t.summary));
}
