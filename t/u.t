use v5.36; use lib 't/lib'; use PBA::Test::VM; use PBA::Test::Front; use PBA::Test::QMP; use PBA::Test::Model; use Test::More; use Time::HiRes qw(time sleep);
sub receive_exactly ($socket, $length) {
    my $data = '';
    while (length($data) < $length) {
        my $n = sysread($socket, $data, $length - length($data), length($data));
        die "the NBD connection ended\n" if !$n;
    }
    return $data;
}

sub open_export ($path, $name) {
    my $socket = IO::Socket::UNIX->new($path) // die "cannot connect to $path: $!\n";
    receive_exactly($socket, 18);
    syswrite($socket, pack('N a8 N N a*', 3, 'IHAVEOPT', 1, length($name), $name));
    receive_exactly($socket, 10);
    return $socket;
}

# Returns the error number and the data.
sub nbd_command ($socket, $command, $offset, $length) {
    syswrite($socket, pack('N n n Q> Q> N', 0x25609513, 0, $command, 1, $offset, $length));
    my ($magic, $error) = unpack('N N', receive_exactly($socket, 16));
    return ($error, $error || $command != 0 ? '' : receive_exactly($socket, $length));
}

sub nbd_read ($socket, $offset, $length) { return nbd_command($socket, 0, $offset, $length) }
sub nbd_trim ($socket, $offset, $length) { return (nbd_command($socket, 4, $offset, $length))[0] }
my $fn=sub ($path,$name,$size,$file,$step,$struct=0) {
  my $s=open_export($path,$name); open my $fh,'>:raw',$file; for(my $o=0;$o<$size;$o+=$step){ my $l=$size-$o<$step?$size-$o:$step; my($e,$dd)=nbd_read($s,$o,$l); die $e if $e; print $fh $dd } close $fh };
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
$fn->("$d/nbd","one",24<<20,"$d/i1",$ENV{STEP});$fn->("$d/nbd","drive-two",16<<20,"$d/i2",$ENV{STEP});$fn->("$d/nbd","three",16<<20,"$d/i3",$ENV{STEP});
my %im=(one=>"$d/i1",two=>"$d/i2",three=>"$d/i3");
my ($n,$w)=$model->check_images(\%im);
say "after $after ", $w//'ok', ' ', join " ", map { "$_: ". $model->highest_seq($_,$im{$_}) } sort keys %im;
sleep 0.5;
}
