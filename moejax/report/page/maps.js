// ---------------------------------------------------------------- maps: targets by tokens, layers by experts, tokens, heads

const share = (row, c) => { const sum = row.reduce((s, x) => s + Math.abs(x || 0), 0); return sum ? Math.abs(row[c] || 0) / sum : 0; };
const boundary = () => view().prompt_length;

// The matrix without the tokens behind each target.
const matrixValues = () => data.targets.map((_, n) => { const t = entry(n); return t.tokens.map((x, c) => c > t.position ? null : x); });

function buildMaps() {
  const layerName = r => r === L ? 'final' : `L${r}`;
  maps.matrix = new HeatMap(byId('map-matrix'), {legend: 'legend-matrix', least: 17, most: 96, tokens: true, names: true, boundary,
    rowLabel: n => visible(data.targets[n].label), tellRow: tellTarget,
    pick: (n, c) => { selectTarget(n); if (c !== null) selectToken(c); },
    tell: (n, c) => c > entry(n).position ? '' : `target ${visible(data.targets[n].label)}\n${quoted(view().tokens[c])} at position ${c}\nrelevance ${fmt(entry(n).tokens[c])}`});
  maps.experts = new HeatMap(byId('map-experts'), {legend: 'legend-experts', least: 7, most: 64, rowLabel: r => `L${r}`,
    tell: (r, c) => `layer ${r}, expert ${c}\nrelevance ${fmt(current().expert_map[r][c])}\n` +
      `${percent(share(current().expert_map[r], c))} of the layer\n${data.counts[r][c]} of ${data.tokens.length} tokens routed`});
  maps.layers = new HeatMap(byId('map-layers'), {legend: 'legend-layers', least: 17, most: 96, tokens: true, rowLabel: layerName, boundary,
    pick: (r, c) => selectToken(c),
    tell: (r, c) => `${quoted(view().tokens[c])} at position ${c}\nentering ${r === L ? 'the final norm' : `layer ${r}`}\nrelevance ${fmt(current().layers[r][c])}`});
  maps.heads = new HeatMap(byId('map-heads'), {legend: 'legend-heads', least: 7, most: 64, rowLabel: r => `L${r}`,
    tell: (r, c) => `layer ${r}, head ${c}\nrelevance ${fmt(current().head_map[r][c])}\n${percent(share(current().head_map[r], c))} of the layer`});
  maps.edges = new HeatMap(byId('map-edges'), {legend: 'legend-edges', least: 5, most: 48, tokens: true, names: true, compact: true, boundary,
    rowLabel: r => columnName(r, 12), tell: tellEdge});
}

// ---------------------------------------------------------------- the experts that are shown: all, or the largest

const TOPS = [['all', 'all experts'], ['layer 1', 'largest of each layer'], ['layer 3', '3 largest of each layer'], ['layer 8', '8 largest of each layer'],
  ['model 5', '5 largest of the model'], ['model 20', '20 largest of the model'], ['model 50', '50 largest of the model']];

function topExperts(map) {
  const [where, number] = state.top.split(' ');
  if (where === 'all') return map;
  const keep = rows => new Set(rows.flatMap(r => map[r].map((x, e) => [r * E + e, Math.abs(x || 0)])).filter(([, x]) => x)
    .sort((a, b) => b[1] - a[1]).slice(0, Number(number)).map(([place]) => place));
  const layers = map.map((_, r) => r);
  const kept = where === 'model' ? keep(layers) : new Set(layers.flatMap(r => [...keep([r])]));
  return map.map((row, r) => row.map((x, e) => kept.has(r * E + e) ? x : null));
}

function renderExperts() {
  byId('map-experts').closest('details').hidden = !E;
  if (!E) return;
  const map = current().expert_map, shown = topExperts(map);
  maps.experts.show(shown, 'Relevance by layer and expert', largest(map));
  const listed = state.top === 'all' ? [] : shown.flatMap((row, r) => row.map((x, e) => [r, e, x]).filter(([, , x]) => x !== null));
  const sorted = listed.sort((a, b) => Math.abs(b[2]) - Math.abs(a[2])).slice(0, 50);
  fill(byId('top-experts'), ...sorted.map(([r, e, x]) => el('li', {}, `L${r} E${e} `, el('span', {class: 'num'}, fmt(x)))));
}

function renderMaps() {
  const t = current();
  if (N > 1) maps.matrix.show(matrixValues(), 'Relevance by target and token');
  renderExperts();
  maps.layers.show(t.layers, 'Relevance by layer and token');
  byId('map-heads').closest('details').hidden = !t.head_map[0].length;
  if (t.head_map[0].length) maps.heads.show(t.head_map, 'Relevance by layer and attention head');
  renderEdges();
}
