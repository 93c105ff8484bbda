// The page: what is shown, and what happens when somebody draws, types or slides.
import { itcScore } from './lib/retriever.mjs';
import { showLooks } from './looks.mjs';
import { Model, newestOnly } from './model.mjs';
import { decode } from './pictures.mjs';
import { ranksOf, showMove, showRanked } from './ranks.mjs';
import { Stage } from './stage.mjs';

const TILES = 12; // pictures shown of a ranking, the current one always among them
const MEGABYTE = 1e6;
const find = (id) => document.getElementById(id);
const state = { pictures: [], sentences: [], picture: null, sentence: null, alpha: 0, look: 'boxes', info: null, page: null };
const stage = new Stage(find('stage'));
let model;

// Loading -----------------------------------------------------------------------------------------------------------

async function start() {
  document.body.dataset.state = 'loading';
  try {
    const answer = await fetch('page.json').catch(() => null);
    if (!answer?.ok) throw new Error('page.json could not be loaded: copy the whole folder to the server, or check the connection');
    state.page = await answer.json();
    model?.close();
    model = new Model({ onProgress: showDownload, onPreparing: () => showStep('Preparing the model…', null, '') });
    const provider = new URLSearchParams(location.search).get('provider') ?? 'wasm';
    state.info = await model.ask('load', { page: { ...state.page, pictures: [] }, provider });
    await addGallery();
    begin();
    document.body.dataset.state = 'ready';
    show(state.picture);
  } catch (error) {
    find('failed-text').textContent = error.message;
    document.body.dataset.state = 'failed';
  }
}

function showDownload({ done, total }) {
  if (total) showStep('Getting the model…', done / total, `${(done / MEGABYTE).toFixed(1)} of ${(total / MEGABYTE).toFixed(1)} MB`);
}

function showStep(text, share, detail) {
  find('loading-text').textContent = text;
  find('loading-detail').textContent = detail || 'It runs on this device alone.';
  const bar = find('loading-bar');
  if (share === null) bar.removeAttribute('value');
  else bar.value = share;
}

async function addGallery() {
  const { pictures, sentences } = state.page;
  state.pictures = [];
  for (const [index, { name, file, boxes }] of pictures.entries()) {
    showStep('Looking at the pictures…', index / pictures.length, `${index + 1} of ${pictures.length}`);
    const answer = await fetch(file);
    if (!answer.ok) throw new Error(`${file} could not be loaded: copy the whole folder to the server`);
    state.pictures.push(await read(await answer.blob(), name, file, boxes));
  }
  state.sentences = [];
  await addSentences(sentences);
}

async function read(blob, name, url, own) {
  const bitmap = await decode(blob, name), size = { width: bitmap.width, height: bitmap.height };
  const tokens = await model.ask('tokens', { bitmap }, [bitmap]);
  const stock = await model.ask('features', { tokens, boxes: [], size });
  return { key: `${state.pictures.length}-${name}`, name, url, own, boxes: [], stale: false, boxed: null, tokens, stock, size, ...size };
}

async function addSentences(texts) {
  const vectors = await model.ask('texts', { texts });
  texts.forEach((text, index) => state.sentences.push({ key: text, text, vector: vectors[index] }));
}

function begin() {
  const { alpha, takesBoxes } = state.info, slider = find('alpha');
  document.body.classList.toggle('no-boxes', !takesBoxes);
  Object.assign(slider, { min: 0, max: 2 * alpha, step: alpha / 16, value: alpha });
  find('alpha-marks').innerHTML = `<option value="${alpha}"></option>`;
  find('alpha-default').textContent = `calibrated (${alpha})`;
  state.alpha = alpha;
  state.picture = state.pictures[state.page.start.picture];
  state.sentence = state.sentences.find(({ text }) => text === state.page.start.sentence) ?? state.sentences[0];
}

// Scores ------------------------------------------------------------------------------------------------------------

const featuresOf = (picture) => picture.boxed ?? picture.stock;
const scoreOf = (features, sentence) => itcScore(features, sentence.vector).score;

/** Encodes one stale picture after the other, the one on the stage first, always with the newest boxes and strength. */
const refresh = newestOnly(async () => {
  const picture = state.picture.stale ? state.picture : state.pictures.find(({ stale }) => stale);
  if (!picture) return render();
  picture.stale = false;
  const { tokens, size, boxes } = picture;
  try {
    picture.boxed = boxes.length ? await model.ask('features', { tokens, boxes, size, alpha: state.alpha }) : null;
  } catch (error) {
    note(error.message);
  }
  render();
  refresh();
});

function changed(picture) {
  picture.stale = true;
  document.body.dataset.settled = 'false';
  refresh();
}

// What is shown -----------------------------------------------------------------------------------------------------

function render() {
  showStrip();
  showSentences();
  showPictures();
  const { picture, sentence } = state;
  const looks = { picture, sentence, features: featuresOf(picture), selected: stage.selected, look: state.look, info: state.info };
  document.body.classList.toggle('no-attention', !picture.stock.attention.length);
  document.body.classList.toggle('boxed', Boolean(picture.boxed));
  if (picture.stock.attention.length) showLooks(looks, choose);
  find('alpha-value').textContent = `α = ${Number(state.alpha.toPrecision(3))}`;
  find('picture-note').textContent = picture.boxes.length ? 'drag to move, corner to resize' : 'drag over something small';
  find('own-boxes').hidden = !picture.own?.length;
  find('clear').disabled = !picture.boxes.length;
  document.body.dataset.settled = String(!state.pictures.some(({ stale }) => stale));
}

function choose(look) {
  state.look = look === 'match' ? 'match' : 'boxes';
  if (typeof look === 'number') stage.select(look);
  render();
}

function showStrip() {
  const strip = find('strip');
  while (strip.children.length < state.pictures.length) {
    const picture = state.pictures[strip.children.length], option = document.createElement('button');
    Object.assign(option, { type: 'button', role: 'option', innerHTML: '<img alt="" loading="lazy"><i></i>' });
    Object.assign(option.firstChild, { src: picture.url, width: picture.width, height: picture.height });
    option.ariaLabel = picture.name;
    option.addEventListener('click', () => show(picture));
    strip.append(option);
  }
  state.pictures.forEach((picture, index) => {
    strip.children[index].ariaSelected = String(picture === state.picture);
    strip.children[index].lastChild.textContent = picture.boxes.length || '';
  });
}

function show(picture) {
  state.picture = picture;
  stage.show(picture);
  render();
  const thumb = find('strip').children[state.pictures.indexOf(picture)], strip = find('strip');
  strip.scrollTo({ left: thumb.offsetLeft - (strip.clientWidth - thumb.clientWidth) / 2, behavior: 'smooth' });
}

function showSentences() {
  const { picture, sentences } = state;
  const now = sentences.map((sentence) => scoreOf(featuresOf(picture), sentence));
  const before = ranksOf(sentences.map((sentence) => scoreOf(picture.stock, sentence))), ranks = ranksOf(now);
  const items = sentences.map((sentence, index) => ({ ...sentence, sentence, score: now[index], before: before[index], rank: ranks[index] }));
  items.sort((a, b) => a.rank - b.rank);
  showRanked(find('sentences'), items, makeSentence, (element, item) => {
    const [button, remove] = element.children, [place, text, move, bar, score] = button.children;
    place.textContent = item.rank;
    text.textContent = item.text;
    showMove(move, item.before, item.rank);
    bar.style.setProperty('--share', Math.max(0, Math.min(1, item.score)));
    score.textContent = item.score.toFixed(3);
    button.ariaPressed = String(item.sentence === state.sentence);
    element.dataset.score = item.score;
    remove.hidden = sentences.length < 2;
  });
}

function makeSentence({ sentence }) {
  const element = document.createElement('li');
  element.innerHTML = '<button type="button" class="row"><b></b><span></span><em></em><i></i><output></output></button>'
    + '<button type="button" class="remove" aria-label="Remove this sentence">×</button>';
  element.firstChild.addEventListener('click', () => {
    state.sentence = sentence;
    render();
  });
  element.lastChild.addEventListener('click', () => {
    state.sentences = state.sentences.filter((one) => one !== sentence);
    if (state.sentence === sentence) [state.sentence] = state.sentences;
    render();
  });
  return element;
}

function showPictures() {
  const { pictures, sentence, picture: current } = state;
  const now = pictures.map((picture) => scoreOf(featuresOf(picture), sentence));
  const before = ranksOf(pictures.map((picture) => scoreOf(picture.stock, sentence))), ranks = ranksOf(now);
  const items = pictures.map((picture, index) => ({ key: picture.key, picture, score: now[index], before: before[index], rank: ranks[index] }));
  items.sort((a, b) => a.rank - b.rank);
  const own = items.find(({ picture }) => picture === current);
  const shown = own.rank <= TILES ? items.slice(0, TILES) : [...items.slice(0, TILES - 1), own];
  showRanked(find('pictures'), shown, makeTile, (element, { picture, score, before: old, rank }) => {
    const button = element.firstChild, [, place, move] = button.children;
    place.textContent = rank;
    showMove(move, old, rank);
    element.dataset.name = picture.name;
    element.dataset.score = score;
    element.classList.toggle('current', picture === current);
    button.ariaLabel = `Place ${rank}: ${picture.name}, score ${score.toFixed(3)}`;
  });
  find('query').textContent = `“${sentence.text}”`;
  const place = `<b>This picture is ${ordinal(own.rank)} of ${pictures.length}</b>`;
  find('place').innerHTML = current.boxes.length ? `${place}, ${own.before === own.rank ? 'as' : `${ordinal(own.before)}`} without boxes.` : `${place}.`;
}

function makeTile({ picture }) {
  const element = document.createElement('li');
  element.innerHTML = '<button type="button"><img alt=""><b></b><em></em></button>';
  element.querySelector('img').src = picture.url;
  element.firstChild.addEventListener('click', () => show(picture));
  return element;
}

function ordinal(number) {
  const last = number % 100 > 10 && number % 100 < 14 ? 0 : number % 10;
  return `${number}${['th', 'st', 'nd', 'rd'][last] ?? 'th'}`;
}

/** A message that goes away by itself, or when it is clicked. */
function note(text) {
  const element = document.createElement('p');
  element.textContent = text;
  element.addEventListener('click', () => element.remove());
  find('notes').append(element);
  setTimeout(() => element.remove(), 12_000);
}

// What people do ----------------------------------------------------------------------------------------------------

stage.addEventListener('change', () => {
  state.picture.boxes = stage.boxes.map((box) => [...box]);
  state.look = 'boxes';
  changed(state.picture);
});
stage.addEventListener('select', () => {
  state.look = 'boxes';
  render();
});
find('again').addEventListener('click', start);
find('add-box').addEventListener('click', () => stage.add());
find('clear').addEventListener('click', () => stage.replace([]));
find('own-boxes').addEventListener('click', () => stage.replace(state.picture.own));
find('alpha').addEventListener('input', ({ target }) => setAlpha(Number(target.value)));
find('files').addEventListener('change', ({ target }) => {
  addFiles([...target.files]);
  target.value = '';
});
find('show').addEventListener('click', showStart);
find('new-sentence').addEventListener('submit', async (event) => {
  event.preventDefault();
  const text = find('sentence').value.trim();
  const old = state.sentences.find((one) => one.text === text);
  if (!text) return;
  try {
    if (!old) await addSentences([text]);
    state.sentence = old ?? state.sentences.at(-1);
    find('sentence').value = '';
    render();
  } catch (error) {
    note(error.message);
  }
});

function setAlpha(alpha) {
  state.alpha = alpha;
  find('alpha').value = alpha;
  for (const picture of state.pictures) if (picture.boxes.length) picture.stale = true;
  document.body.dataset.settled = 'false';
  refresh();
}

/** The picture that the page begins with: a box around its smallest thing, from no strength to the calibrated one. */
function showStart() {
  const { picture, sentence, box } = state.page.start, { alpha } = state.info;
  state.sentence = state.sentences.find(({ text }) => text === sentence) ?? state.sentence;
  show(state.pictures[picture]);
  const calm = matchMedia('(prefers-reduced-motion: reduce)').matches;
  setAlpha(calm ? alpha : 0);
  stage.replace([box]);
  if (calm) return;
  const first = performance.now() + 700;
  const step = (now) => {
    const share = Math.min(1, Math.max(0, now - first) / 1600);
    setAlpha(alpha * share * share * (3 - 2 * share));
    if (share < 1) requestAnimationFrame(step);
  };
  requestAnimationFrame(step);
}

async function addFiles(files) {
  for (const file of files) {
    try {
      document.body.classList.add('reading');
      const picture = await read(file, file.name, URL.createObjectURL(file), null);
      state.pictures.push(picture);
      render();
      show(picture);
    } catch (error) {
      note(error.message);
    }
  }
  document.body.classList.remove('reading');
}

let depth = 0; // of dragenter without its dragleave
document.addEventListener('dragenter', () => document.body.classList.toggle('dropping', ++depth > 0));
document.addEventListener('dragleave', () => document.body.classList.toggle('dropping', --depth > 0));
document.addEventListener('dragover', (event) => event.preventDefault());
document.addEventListener('drop', (event) => {
  event.preventDefault();
  depth = 0;
  document.body.classList.remove('dropping');
  if (document.body.dataset.state === 'ready') addFiles([...event.dataTransfer.files]);
});

// For the console, and for tests.
const scores = () => state.pictures.map((picture) => state.sentences.map((one) => scoreOf(featuresOf(picture), one)));
globalThis.qpert = { state, scores, ask: (...request) => model.ask(...request) };
start();
