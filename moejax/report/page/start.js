// ---------------------------------------------------------------- state

function selectToken(c) {
  const before = byId(`tok-${state.token}`), after = byId(`tok-${c}`);
  before.setAttribute('aria-selected', 'false');
  before.tabIndex = -1;
  after.setAttribute('aria-selected', 'true');
  after.tabIndex = 0;
  state.token = c;
  showSelected();
}

function showSelected() {
  const box = byId('tokens'), node = byId(`tok-${state.token}`);
  const top = node.offsetTop - box.offsetTop;
  if (top < box.scrollTop || top + node.offsetHeight > box.scrollTop + box.clientHeight) box.scrollTop = top - box.clientHeight / 2;
  renderToken();
  maps.layers.mark(state.token);
  maps.matrix.see(state.token);
}

function strongestToken() {
  const values = current().tokens.map(x => Math.abs(x || 0));
  return values.indexOf(values.reduce((m, x) => Math.max(m, x), 0));
}

function selectTarget(n) {
  state.target = n;
  for (const b of byId('targets').children) b.setAttribute('aria-pressed', String(Number(b.dataset.target) === n));
  state.token = strongestToken();
  maps.matrix.markRow(n);
  renderAll();
}

function mergeWords(merged) {
  state.words = merged;
  state.token = strongestToken();
  renderAll();
}

function renderAll() {
  hideTip();
  renderTarget();
  renderTokens();
  renderCandidates();
  renderMaps();
  showSelected();
  renderLedger();
}

// ---------------------------------------------------------------- in a notebook's frame

// The frame is as high as the page. It is the notebook's own, so its element can be reached; elsewhere nothing happens.
function fitFrame() {
  let frame = null;
  try { frame = window.frameElement; } catch (error) { return; }
  if (!frame || !frame.hasAttribute('srcdoc')) return;
  document.documentElement.classList.add('framed');
  for (const id of ['details-layers', 'details-heads', 'details-ledger']) byId(id).open = false;
  const fit = () => { frame.style.height = `${Math.ceil(document.body.getBoundingClientRect().height)}px`; };
  onResize(document.body, fit);
  if (frame.previousElementSibling) frame.previousElementSibling.hidden = true;
  const body = frame.ownerDocument.body.dataset, html = frame.ownerDocument.documentElement;
  // JupyterLab, VS Code and Colab have themes of their own
  if (body.jpThemeLight) setTheme(body.jpThemeLight === 'true' ? 'light' : 'dark');
  else if (body.vscodeThemeKind) setTheme(body.vscodeThemeKind.includes('light') ? 'light' : 'dark');
  else if (['light', 'dark'].includes(html.getAttribute('theme'))) setTheme(html.getAttribute('theme'));
}

document.documentElement.classList.add('scripted');
fitFrame();
renderHeader();
buildMaps();
renderButtons();
renderTargets();
fill(byId('expert-choice'), select('Show ', state.top, TOPS, top => { state.top = top; renderExperts(); }));
listenTokens();
selectTarget(0);
systemDark.addEventListener('change', renderAll);
addEventListener('scroll', hideTip, {passive: true});
