use v5.36; use lib 't/lib'; use PBA::Test::VM; use PBA::Test::Front; use PBA::Test::QMP; use PBA::Test::Model; use Test::More; use Time::HiRes qw(time sleep);
my $mode=shift;
my @disks=({id=>'one',size=>24<<20,throttle=>1},{id=>'two',size=>16<<20,bus=>'scsi',shape=>'drive'},{id=>'three',size=>16<<20,format=>'qcow2'});
my $vm = PBA::Test::VM->start(disks => \@disks);
$vm->add_fleecing_node($_) for $vm->disk_ids;
$vm->guest->start_churn(seed=>5,disks=>[$vm->disk_ids],blocks=>1024);
my $model=PBA::Test::Model->new(seed => 5, disks => [map {{id=>$_->{id},size=>$_->{size}}} @disks], blocks => 1024);
my $front=PBA::Test::Front->start(qemu_qmp=>$vm->qmp_path,listen=>$vm->dir.'/front',pid=>$vm->pid);
my $q=PBA::Test::QMP->new(path=>$front->socket_path);
my $infos=$q->execute('backup-access-setup','target-id'=>'t',devices=>[map {{device=>$_,'bitmap-mode'=>$mode}} 'drive-two','one','three']);
my $after=$vm->guest->churn_status->{last};
my $d=$vm->dir;
$q->execute('nbd-server-start',addr=>{type=>'unix',data=>{path=>"$d/nbd"}});
for (@$infos) { my @b = $_->{'bitmap-name'} ? (bitmaps=>[{node=>$_->{'bitmap-node-name'},name=>$_->{'bitmap-name'}}]):(); @b=() if $ENV{NOBM};
$q->execute('block-export-add',id=>$_->{device},name=>$_->{device},type=>'nbd','node-name'=>$_->{'node-name'},@b, writable=> $ENV{RO}?JSON::PP::false : JSON::PP::true) ;}
for (1..2) {
system("nbdcopy -C 1 -R 1 'nbd+unix:///one?socket=$d/nbd' $d/i1; nbdcopy -C 1 -R 1 'nbd+unix:///drive-two?socket=$d/nbd' $d/i2;  nbdcopy -C 1 -R 1 'nbd+unix:///three?socket=$d/nbd' $d/i3");
my %im=(one=>"$d/i1",two=>"$d/i2",three=>"$d/i3");
my ($n,$w)=$model->check_images(\%im);
say "after $after ", $w//'ok', ' ', join " ", map { "$_: ". $model->highest_seq($_,$im{$_}) } sort keys %im;
sleep 0.5;
}
