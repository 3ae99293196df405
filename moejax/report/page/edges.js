// ---------------------------------------------------------------- attention edges: what each query reads from each key

const edgeLayers = () => Object.keys(data.targets[0].edges);

// Rows are queries; each has the keys up to it.
function edgeValues() {
  const heads = current().edges[state.layer];
  const chosen = state.head === 'sum' ? heads : [heads[Number(state.head)]];
  return chosen[0].map((row, q) => Array.from({length: count()}, (_, k) => k > q ? null : chosen.reduce((s, head) => s + (head[q][k] || 0), 0)));
}

function tellEdge(q, k) {
  const value = maps.edges.values[q][k];
  return value === null ? '' : `query ${quoted(view().tokens[q])} at ${q}\nreads key ${quoted(view().tokens[k])} at ${k}\nrelevance ${fmt(value)}`;
}

function renderEdges() {
  const layers = edgeLayers();
  byId('map-edges').closest('details').hidden = !layers.length;
  if (!layers.length) return;
  if (state.layer === null) state.layer = layers[0];
  const heads = current().edges[state.layer].length;
  if (state.head !== 'sum' && Number(state.head) >= heads) state.head = 'sum';
  fill(byId('edge-choice'),
    select('Layer ', state.layer, layers.map(l => [l, l]), l => { state.layer = l; renderEdges(); }),
    select('Head ', state.head, [['sum', 'sum of all'], ...(heads > 1 ? Array.from({length: heads}, (_, h) => [String(h), String(h)]) : [])],
      h => { state.head = h; renderEdges(); }));
  const values = edgeValues();
  maps.edges.show(values, 'Relevance by query and key');
  const listed = values.flatMap((row, q) => row.map((x, k) => [q, k, x])).filter(([, , x]) => x).sort((a, b) => Math.abs(b[2]) - Math.abs(a[2]));
  fill(byId('top-edges'), ...listed.slice(0, 8).map(([q, k, x]) => el('li', {}, el('span', {class: 'mono'}, quoted(view().tokens[q])), ` at ${q} reads `,
    el('span', {class: 'mono'}, quoted(view().tokens[k])), ` at ${k} `, el('span', {class: 'num'}, fmt(x)))));
}
